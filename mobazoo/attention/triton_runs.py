"""Where the Triton kernels run, and what happens before the first of them does. Importing this imports no Triton."""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch

log = logging.getLogger("mobazoo.attention")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256

# The gate keeps the best blocks of a query in registers.
MOST_READS = 128


def refuses(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot: CUDA in float32, float16 and bfloat16 up to head dim 256; a CPU when interpreted."""
    if device not in ("cpu", "cuda"):
        return f"the Triton kernels run on CUDA, or on a CPU under the interpreter, not on {device}"
    if dtype not in _DTYPES:
        return f"the Triton kernels compute in float32, float16 and bfloat16, not in {dtype}"
    if head_dim > _MAX_HEAD_DIM:
        return f"the Triton kernels take head dims up to {_MAX_HEAD_DIM}, got {head_dim}"
    if find_spec("triton") is None:
        return "the package triton is not installed (pip install 'mobazoo[triton]')"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu" and not interpreted:
        return "on a CPU Triton only interprets: set TRITON_INTERPRET=1 before Python starts"
    return None


def refuses_gate(device: str, dtype: torch.dtype, head_dim: int, reads: int) -> str | None:
    """The same of the gate, which takes up to ``MOST_READS`` routed blocks a query."""
    if reads > MOST_READS:
        return f"the Triton gate chooses up to {MOST_READS} blocks beside the own one, got {reads}"
    return refuses(device, dtype, head_dim)


@cache
def begin(way: str, dtype: torch.dtype, dim: int, device: str) -> None:
    """Before the first launch of a kind: says that it compiles, or puts the interpreter right."""
    if device == "cpu":
        import_module("mobazoo.attention.kernels.triton_interpret").mend()
    else:
        said = "backend triton: the first %s in %s with head dim %d compiles its kernels, which takes seconds"
        log.info(said, way, dtype, dim)
