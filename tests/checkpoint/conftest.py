from pathlib import Path

import pytest
from transformers.utils import logging

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
