"""``examples/llama.py`` on a tiny folder made here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.models.tiny import VOCAB, stock

FILE = Path(__file__).parents[2] / "examples" / "llama.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_llama", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    stock("llama", "eager").save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


PROMPT = " ".join(f"w{i}" for i in range(2, 42))


def run(example: ModuleType, folder: Path, *flags: str) -> list[str]:
    return example.main(["--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "6", *flags]).split()


def test_both_names_say_the_same(example: ModuleType, folder: Path) -> None:
    flags = ("--moba-chunk-size", "4", "--moba-topk", "2")
    said = run(example, folder, *flags, "--attn", "moba")
    assert len(said) == 46
    assert said == run(example, folder, *flags, "--attn", "moba_naive")


def test_blocks_that_cover_everything_are_the_model_as_it_is(example: ModuleType, folder: Path) -> None:
    dense = AutoModelForCausalLM.from_pretrained(folder)
    tokens = dense.generate(torch.arange(2, 42)[None], max_new_tokens=6, do_sample=False)
    assert run(example, folder) == [f"w{i}" for i in tokens[0].tolist()]


def test_unknown_attention_is_refused(example: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(example, folder, "--attn", "sdpa")
    assert "invalid choice: 'sdpa'" in capsys.readouterr().err
