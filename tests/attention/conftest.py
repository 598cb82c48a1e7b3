"""Two threads, on whatever machine: the CPU kernels divide their work by the number of threads."""

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
