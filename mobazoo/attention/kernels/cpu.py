"""The flash schedule on a CPU: compiled code where it can be had, else torch's operators."""

from __future__ import annotations

from torch import Tensor

from mobazoo.attention.kernels import cpu_compiled, cpu_torch
from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.segments import first_slot
from mobazoo.errors import InputError


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, T, D]`` and log-sum-exp ``[B, Hq, T]``, at least float32; padding gets zeros and -inf."""
    _check(q.shape[2], k.shape[2], layout)
    by = cpu_compiled if cpu_compiled.serves(q.dtype) else cpu_torch
    return by.forward(q, k, v, layout, scale)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``, accumulated in float32 and rounded once."""
    by = cpu_compiled if cpu_compiled.serves(q.dtype) else cpu_torch
    return by.backward(dout, q, k, v, out, lse, layout, scale)


def _check(queries: int, slots: int, layout: Layout) -> None:
    """Numbers that would be read out of bounds, and that ``attend`` does not look at in a graph."""
    first_slot("attend", queries, slots, layout.q_start)
    if layout.start is None or layout.start.numel() == 0:
        return
    last = int(layout.start.max())
    if last >= 0 and last + layout.block_size > slots:
        raise InputError(
            f"attend: routes.start has a block of {layout.block_size} slots from slot {last} on, S={slots}"
        )
