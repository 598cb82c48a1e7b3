"""A tokenizer and small texts to train on."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mobazoo.checkpoint import staging
from mobazoo.config.data import Data
from mobazoo.config.tokenizer import TokenizerRecipe
from mobazoo.config.train import TrainRecipe
from mobazoo.data.bpe import train_tokenizer
from mobazoo.train import train

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
RULES = [{"layers": ":", "pattern": "moba", "block_size": 8, "top_k": 2}]
HELD_OUT = Data("stdlib", files=["tomllib/__init__.py", "tomllib/_types.py"])  # ten rows


@pytest.fixture(autouse=True, scope="package")
def frozen() -> Iterator[None]:
    """accelerate collects garbage in every run; looking at all that was ever imported took half of each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a disk proves nothing here."""
    monkeypatch.setattr(staging, "_sync_one", lambda path: None)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    dest = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(TokenizerRecipe(str(dest), Data("stdlib", files=["json/*.py"]), vocab=300, max_length=64))
    return str(dest)


def small(tokenizer: str, folder: Path, /, **fields: Any) -> TrainRecipe:
    """A recipe of a few steps."""
    given: dict[str, Any] = {
        "model": "llama-tiny",
        "dest": str(folder / "out"),
        "data": Data("stdlib", files=["json/*.py"]),
        "tokenizer": tokenizer,
        "config": SIZES,
        "attention": RULES,
        "length": 64,
        "batch": 4,
        "steps": 4,
        "learning_rate": 1e-2,
        "log_every": 1,
        "device": "cpu",
    }
    return TrainRecipe(**{**given, **fields})


@pytest.fixture
def recipe(tokenizer: str, tmp_path: Path) -> Any:
    return partial(small, tokenizer, tmp_path)


@pytest.fixture(scope="session")
def plain_run(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model after four steps, to be read only."""
    made = small(tokenizer, tmp_path_factory.mktemp("plain"))
    train(made)
    return Path(made.dest)


def metrics(dest: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (dest / "metrics.jsonl").read_text().splitlines()]
