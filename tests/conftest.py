"""Set before torch and triton load: waiting threads sleep, because on a shared machine spinning starves the others."""

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from tests.memory import Peak, probes

# Models this small only wait for threads. Attention's own tests take two: see attention/conftest.py.
torch.set_num_threads(1)

# Our Triton kernels then run on the CPU; what PyTorch compiles does not change.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def peak() -> Iterator[Peak]:
    """See ``tests.memory.probes``."""
    with probes() as peak:
        yield peak
