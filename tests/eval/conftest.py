from pathlib import Path

import pytest

from tests.small import one_thread, plain_checkpoint, text_folder, zoo_checkpoint

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def zoo(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return zoo_checkpoint(plain, tmp_path_factory.mktemp("zoo") / "checkpoint")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_folder(tmp_path_factory.mktemp("texts") / "here")
