"""Which backend ``auto`` takes: one table, first row that applies. Numbers behind it: docs/benchmarks/."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mobazoo.attention.backends import BACKENDS
from mobazoo.attention.backends.decode import FEW
from mobazoo.attention.kernels import cpu_compiled
from mobazoo.attention.problem import Problem

# Queries from which compiled code is faster on a CPU than PyTorch's attention, which is called sooner.
_LONG = 512


def _compiled(p: Problem) -> bool:
    return p.device == "cpu" and p.dtype in (torch.float32, torch.bfloat16) and cpu_compiled.serves(p.dtype)


_TABLE: tuple[tuple[str, Callable[[Problem], bool], str], ...] = (
    ("flash", lambda p: not p.moba and p.queries >= _LONG and _compiled(p), "dense, compiled for this processor"),
    ("sdpa", lambda p: not p.moba and p.whole and (p.prefill or p.queries == 1), "dense, no mask needed"),
    ("sdpa", lambda p: not p.moba and p.queries == 1, "dense, one query: a mask of one line"),
    (
        "decode",
        lambda p: p.moba and p.queries <= FEW and not p.prefill,
        "few queries: reads their blocks where they lie",
    ),
    ("flash", lambda p: True, "reads chosen blocks only, no mask in memory"),
    ("flex", lambda p: p.device == "cuda", "no flash kernel for this dtype or head dim"),
    ("sdpa", lambda p: True, "dense, masks built by chunks of queries"),
    ("reference", lambda p: True, "nothing faster runs here; memory grows as T x S"),
)


def choose(problem: Problem) -> tuple[str, str]:
    """The backend for a problem, and why."""
    for name, applies, why in _TABLE:
        if applies(problem) and BACKENDS[name].unsupported(problem) is None:
            return name, why
    raise AssertionError("the reference backend supports everything")
