from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.small import plain_checkpoint, text_folder, zoo_checkpoint


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def zoo(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_checkpoint(plain, tmp_path_factory.mktemp("zoo") / "checkpoint")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("texts") / "here")
