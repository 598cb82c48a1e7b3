"""What tests of attention share: threads, whatever the machine, and a device that may not be waited for."""

from collections.abc import Iterator

import pytest
import torch


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
def waiting_is_an_error() -> Iterator[None]:
    """Anything that waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
