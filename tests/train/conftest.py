"""A tokenizer and small texts to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mobazoo.checkpoint import staging
from mobazoo.config.data import Data
from mobazoo.config.tokenizer import TokenizerRecipe
from mobazoo.config.train import TrainRecipe
from mobazoo.data.bpe import train_tokenizer

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
RULES = [{"layers": ":", "pattern": "moba", "block_size": 8, "top_k": 2}]


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for a disk proves nothing here."""
    monkeypatch.setattr(staging, "_sync_one", lambda path: None)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    dest = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(TokenizerRecipe(str(dest), Data("stdlib", files=["json/*.py"]), vocab=300, max_length=64))
    return str(dest)


@pytest.fixture
def recipe(tokenizer: str, tmp_path: Path) -> Any:
    """Makes a recipe of a few steps."""

    def make(**fields: Any) -> TrainRecipe:
        given: dict[str, Any] = {
            "model": "llama-tiny",
            "dest": str(tmp_path / "out"),
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

    return make
