"""tokenizer and train on the command line: every shipped recipe dry-runs and fits its model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from mobazoo.cli import app
from mobazoo.cli.verbs import train as verb
from mobazoo.config.data import Data
from mobazoo.config.shipped import RECIPES, shipped
from mobazoo.config.tokenizer import TokenizerRecipe
from mobazoo.data.bpe import train_tokenizer
from mobazoo.train.setup import prepare
from tests.train.test_resume import stop_after

TRAIN = {name: source for name, source in shipped(RECIPES).items() if name.startswith("train/")}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"
GIVEN = {"model": "org/model", "tokenizer": "org/tokenizer", "dest": "there", "data.path": "org/data"}


def call(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


def given(text: str, **values: str) -> list[str]:
    """What a recipe leaves open, said."""
    keys = [line.split(":")[0] for line in text.splitlines() if line.endswith(": ???")]
    keys += ["data.path"] if 'path: "???"' in text else []
    return [f"{key}={({**GIVEN, **values})[key]}" for key in keys]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    dest = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(TokenizerRecipe(str(dest), Data("stdlib", files=["json/*.py"]), vocab=300, max_length=64))
    return str(dest)


@pytest.mark.parametrize("name", TRAIN)
def test_shipped_runs_dry_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("train", name, *given(TRAIN[name].text), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "# would write there" in result.stdout
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "again.yaml").write_text(result.stdout)  # what it prints is the recipe
    assert call("train", "again.yaml", "--dry-run").stdout == result.stdout


@pytest.mark.parametrize("name", [name for name, source in TRAIN.items() if "\nmodel: ???" not in source.text])
def test_shipped_runs_fit_their_models(name: str, tokenizer: str) -> None:
    setup = prepare(verb.resolve(name, given(TRAIN[name].text, tokenizer=tokenizer)))
    assert setup.random
    assert setup.parameters > 10**6


@pytest.mark.slow
def test_small_recipes_run(tokenizer: str, tmp_path: Path) -> None:
    """Each at its own size, for a few rows."""
    AutoTokenizer.from_pretrained(tokenizer, chat_template=TEMPLATE).save_pretrained(tmp_path / "chat")
    chat = [{"role": "user", "content": "one plus one?"}, {"role": "assistant", "content": "two"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    small = [name.removeprefix("train/") for name in TRAIN if name.startswith("train/tiny-")]
    own = {"model": str(tmp_path / "tiny-moba"), "tokenizer": tokenizer, "data.path": str(tmp_path / "chats.jsonl")}
    for name in sorted(small, key=lambda name: name != "tiny-moba"):  # what the others may go on from comes first
        text = TRAIN[f"train/{name}"].text
        words = given(text, **own)
        words += [f"tokenizer={tmp_path / 'chat'}"] if name == "tiny-sft" else ["data.max_documents=40"]
        words += ["validation.max_documents=3"] if "\nvalidation:" in text else []
        done = call("train", name, *words, f"dest={tmp_path / name}", "tokens=null", "steps=10", "batch=1")
        assert done.exit_code == 0, done.output
        assert f"wrote {tmp_path / name}: 10 steps" in done.stdout


def test_documented_launches_are_torchruns() -> None:
    texts = {name: source.text for name, source in shipped(RECIPES).items()}
    texts["docs"] = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    nodes = {}
    for name, text in texts.items():
        for words in re.findall(r"torchrun (.*?-m mobazoo)\b", text):
            found = get_args_parser().parse_args(words.split())
            assert (found.module, found.training_script) == (True, "mobazoo")
            nodes[name] = max(nodes.get(name, 1), int(found.nnodes.split(":")[-1]))
    assert {name for name, most in nodes.items() if most > 1} == {"train/continue-8b", "docs"}
    assert len(nodes) > 5


def test_the_long_run_resolves(tmp_path: Path) -> None:
    result = call("run", "continue-8b-1m", f"folder={tmp_path / 'runs'}", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "stage 7 of 7: train continue-8b" in result.stdout
    assert "rows of 1048576" in result.stdout


def test_from_nothing_to_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tokenizer"
    small = "data={path: stdlib, files: [json/*.py]}"
    done = call("tokenizer", "tokenizer/stdlib", f"dest={folder}", small, "vocab=300")
    assert done.exit_code == 0, done.output
    assert "300 tokens from 5 documents" in done.stdout
    sizes = "config={vocab_size: 300, hidden_size: 32, intermediate_size: 48, head_dim: 8}"
    words = ("train", "tiny-moba-then-full", f"tokenizer={folder}", f"dest={tmp_path / 'out'}", small, sizes)
    more = ("validation=null", "length=64", "batch=2", "tokens=1000", "checkpoint_every=3")
    dry = call(*words, *more, "--dry-run")
    assert "would do 8 steps of 2 rows of 64: 16 rows, 1.02K tokens" in dry.stdout
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")  # of several processes the first one speaks
        assert call(*words, *more, "--dry-run").stdout == ""
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        stopped = call(*words, *more)
    assert stopped.exit_code == 143
    assert "stopped by SIGTERM after step 5 of 8; the same command goes on" in stopped.stderr
    done = call(*words, *more)
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'out'}: 8 steps" in done.stdout
    again = call(*words, *more)
    assert again.exit_code == 2
    assert "exists; pass overwrite=true" in again.stderr
