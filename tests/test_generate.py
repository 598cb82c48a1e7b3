"""Text from converted checkpoints: the command line, chat templates, sampling, batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import mobazoo
from mobazoo.checkpoint.convert import convert
from mobazoo.checkpoint.tokenizer import load_tokenizer
from mobazoo.cli import app
from mobazoo.config.convert import ConvertRecipe
from tests.models.tiny import FAMILIES, VOCAB, error, stock

RULES = [{"layers": ":", "pattern": "moba", "block_size": 4, "top_k": 2}, {"layers": -1, "pattern": "full"}]
PROMPT = " ".join(f"w{i}" for i in range(2, 42))
CHAT = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}{% if add_generation_prompt %}w9{% endif %}"
)


def words(folder: Path, chat: str | None = None) -> None:
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w0", chat_template=chat).save_pretrained(
        folder
    )


@pytest.fixture(scope="module", params=FAMILIES)
def zoo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint with a tokenizer of words."""
    root = tmp_path_factory.mktemp(request.param)
    stock(request.param, "eager").save_pretrained(root / "hf")
    words(root / "hf")
    convert(ConvertRecipe(str(root / "hf"), str(root / "zoo"), attention=RULES, verify=False))
    return root / "zoo"


def call(*args: object) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, args), "device=cpu"])


def written(folder: Path, *args: str) -> list[str]:
    result = call(folder, "--prompt", PROMPT, "max_new_tokens=8", *args)
    assert result.exit_code == 0, result.output
    return result.stdout.split()


def test_the_command_writes_what_the_model_generates(zoo: Path) -> None:
    model = mobazoo.load(zoo)
    tokens = model.generate(torch.arange(2, 42)[None], max_new_tokens=8, do_sample=False)[0, 40:]
    got = written(zoo, "temperature=0")
    assert got == [f"w{i}" for i in tokens.tolist()]
    again = model(torch.arange(2, 42)[None]).logits[0, -1].argmax()  # MoBA read the prompt
    assert got[0] == f"w{int(again)}"


def test_rules_come_after_the_checkpoints_own(zoo: Path) -> None:
    """One meaning of ``attention``: load, convert, generate and show come to the same layers."""
    later = [{"layers": 0, "top_k": 4}, {"layers": ":", "decode": "moba"}]
    loaded = mobazoo.load(zoo, attention=later)
    model = mobazoo.load(zoo)
    model.set_attention([*model.config.moba["attention"], *later])  # which takes the whole list
    assert loaded.config.attention_layers() == model.config.attention_layers()
    convert(ConvertRecipe(str(zoo), str(zoo.parent / "later"), attention=later, verify=False, overwrite=True))
    assert mobazoo.load(zoo.parent / "later").config.attention_layers() == loaded.config.attention_layers()
    tokens = loaded.generate(torch.arange(2, 42)[None], max_new_tokens=8, do_sample=False)[0, 40:]
    given = "attention=" + json.dumps(later)
    shown = [
        CliRunner().invoke(app, ["show", *args]).stdout for args in ([str(zoo), given], [str(zoo.parent / "later")])
    ]
    assert shown[0].splitlines()[2:] == shown[1].splitlines()[2:]
    assert "0\t1\tmoba\t4\t4\tmoba" in shown[0]
    assert written(zoo, "temperature=0", given) == [f"w{i}" for i in tokens.tolist()]


def test_sampling_is_of_the_seed(zoo: Path) -> None:
    hot = ("temperature=50.0",)
    texts = [written(zoo, *hot, "seed=1"), written(zoo, *hot, "seed=1"), written(zoo, *hot, "seed=2")]
    assert texts[0] == texts[1] != texts[2]
    assert written(zoo, *hot, "top_p=0.000001", "seed=3") == written(zoo, "temperature=0")


def test_a_left_padded_batch_is_each_of_its_rows(zoo: Path) -> None:
    tokenizer, model = load_tokenizer(zoo), mobazoo.load(zoo)
    tokenizer.padding_side = "left"
    prompts = [PROMPT, " ".join(PROMPT.split()[:17]), "w5"]
    options: Any = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert batch["attention_mask"].sum(1).tolist() == [40, 17, 1]
    together = model.generate(**batch, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **options)
        assert error(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0]) <= 1e-5
        assert torch.equal(together.sequences[row, 40:], alone.sequences[0, -6:])


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize(
    "said, message",
    [
        ({"num_beams": 2}, "generation_config.json: num_beams=2: a text that is shown as it is written cannot have"),
        ({"num_return_sequences": 3, "do_sample": True}, "generation_config.json: num_return_sequences=3: a text that"),
        ({"cache_implementation": "hybrid"}, "cache_implementation='hybrid': zoo models know dynamic, static, offload"),
    ],
)
def test_a_generation_config_that_cannot_be_streamed(
    family: str, said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stock(family, "eager").save_pretrained(tmp_path)
    words(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    result = call(tmp_path, "--prompt", "w7 w8", "max_new_tokens=4")
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_generation_config_that_asks_for_more_than_tokens(tmp_path: Path) -> None:
    stock("llama", "eager").save_pretrained(tmp_path)
    words(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "return_dict_in_generate": True}))
    result = call(tmp_path, "--prompt", "w7 w8", "max_new_tokens=4", "temperature=0")
    assert result.exit_code == 0, result.output
    assert "4 written" in result.stderr


@pytest.mark.parametrize("family", ["llama"])
def test_a_chat_template_makes_the_prompt(family: str, tmp_path: Path) -> None:
    stock(family, "eager").save_pretrained(tmp_path)
    words(tmp_path, CHAT)
    model = mobazoo.load(tmp_path)
    for args, said in (
        ((), "w0 w7 w8 w9"),
        (("system=w6",), "w0 w6 w0 w7 w8 w9"),  # "user" and "system" are no words of this tokenizer
        (("chat=false",), "w7 w8"),
    ):
        result = call(tmp_path, "--prompt", "w7 w8", "temperature=0", "max_new_tokens=3", *args)
        assert result.exit_code == 0, result.output
        prompt = torch.tensor([[int(word[1:]) for word in said.split()]])
        mask = torch.ones_like(prompt)  # w0 is padding too, but not here
        tokens = model.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=False)[0, prompt.shape[1] :]
        assert result.stdout.split() == [f"w{i}" for i in tokens.tolist() if i]
        assert f"{prompt.shape[1]} tokens read in " in result.stderr
        assert ", 3 written" in result.stderr
    result = call(tmp_path, "--prompt", "w7", "chat=false", "system=w6")
    assert result.exit_code == 2
    assert "system: stands in a chat template, and chat=false; leave it out, or put it into the" in result.stderr


@pytest.mark.parametrize("named", ["TokenizersBackend", "PreTrainedTokenizerFast", None])
def test_the_tokenizer_of_a_converted_folder(zoo: Path, tmp_path: Path, named: str | None) -> None:
    """Also where it leaves its class to the model type, which transformers knows for plain folders only."""
    for name in ("hf", "zoo"):
        (tmp_path / name).mkdir()
        for file in (*(zoo.parent / name).glob("token*"), zoo.parent / name / "config.json"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": named}))
    mine = load_tokenizer(tmp_path / "zoo")
    if named:
        assert mine(PROMPT)["input_ids"] == list(range(2, 42))
    else:
        theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert type(mine) is type(theirs)
        assert mine(PROMPT)["input_ids"] == theirs(PROMPT)["input_ids"]
