"""The flash schedule on a CPU: compiled code where it can be had, else torch's operators."""

from __future__ import annotations

from torch import Tensor

from mobazoo.attention.checks import first_slot
from mobazoo.attention.kernels import cpu_compiled, cpu_torch
from mobazoo.attention.kernels.layout import Layout


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, T, D]`` and log-sum-exp ``[B, Hq, T]``, at least float32; padding gets zeros and -inf."""
    first_slot("attend", q.shape[2], k.shape[2], layout.q_start)  # which a compiled graph could not look at
    by = cpu_compiled if cpu_compiled.serves(q.dtype) else cpu_torch
    return by.forward(q, k, v, layout, scale)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``, accumulated in float32 and rounded once."""
    by = cpu_compiled if cpu_compiled.serves(q.dtype) else cpu_torch
    return by.backward(dout, q, k, v, out, lse, layout, scale)
