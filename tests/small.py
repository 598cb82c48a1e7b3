"""A checkpoint folder with a tokenizer of characters, and texts for it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mobazoo.checkpoint.convert import convert
from mobazoo.config.convert import ConvertRecipe
from mobazoo.errors import InputError

RULES: list[dict[str, Any]] = [{"layers": ":", "pattern": "moba", "block_size": 8, "top_k": 2}]
FULL: list[dict[str, Any]] = [{"layers": ":", "pattern": "full"}]


def refusal(measure: Callable[..., Any], recipe: Any) -> str:
    """The one line with which a measurement refuses a recipe."""
    with pytest.raises(InputError) as caught:
        measure(recipe, lambda *_: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def plain_checkpoint(folder: Path, positions: int = 128) -> Path:
    """A tiny Llama as transformers saves it."""
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": positions}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    for parameter in model.parameters():  # attention that is not flat, so that blocks matter
        parameter.data *= 4
    model.save_pretrained(folder)
    vocabulary = {chr(i): i for i in range(256)}
    spec = {
        "version": "1.0",
        "added_tokens": [
            {"id": 256, "content": "<end>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "fuse_unk": False, "byte_fallback": False},
        "decoder": {"type": "Fuse"},
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "spec.json"), eos_token="<end>").save_pretrained(folder)
    (folder / "spec.json").unlink()
    return folder


def zoo_checkpoint(source: Path, dest: Path) -> Path:
    """The same with MoBA in every layer."""
    convert(ConvertRecipe(str(source), str(dest), attention=RULES, verify=False))
    return dest


def text_folder(folder: Path, lengths: tuple[int, ...] = (30, 70, 80, 90, 100)) -> Path:
    """Text files of so many characters, which are as many tokens."""
    folder.mkdir(parents=True)
    letters = random.Random(0)
    for number, length in enumerate(lengths):
        text = "".join(letters.choices("abcde \n", k=length))
        (folder / f"{number}.txt").write_text(text)
    return folder
