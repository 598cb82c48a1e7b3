"""What tests of attention share: threads, whatever the machine, and a device that may not be waited for."""

from collections.abc import Iterator

import pytest
import torch

from mobazoo.attention.native import build, library


@pytest.fixture(autouse=True, scope="package")
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For thousands of small operations that ask for no number of threads."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by torch's operators, as on a machine without a compiler."""
    monkeypatch.setattr(build, "_library", lambda: None)


@pytest.fixture(params=["compiled", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """CPU code as we compile it, and with torch's operators as on a machine without a compiler."""
    if request.param == "torch":
        monkeypatch.setattr(build, "_library", lambda: None)
    elif library() is None:
        pytest.skip("needs a C++ compiler")
    return str(request.param)


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    """Anything that waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
