from pathlib import Path

import pytest
from transformers.utils import logging

from mobazoo.checkpoint import staging

from .factories import save

logging.disable_progress_bar()


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save(tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tmp_path / "sharded", shards=True)
    return tmp_path / "sharded"


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Waiting for a disk proves nothing here; tests that care look at what would have been waited for."""
    asked: list[Path] = []
    monkeypatch.setattr(staging, "_sync_one", asked.append)
    return asked
