"""Full and block attention by our own Triton kernels: queries are gathered inside the kernel. See docs/kernels.md.

Not chosen by ``auto``: it has not been measured on a GPU. On a CPU it runs under Triton's interpreter, which checks
the kernels and is slow.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.kernels.operators import operator
from mobazoo.attention.kernels.slabs import dense
from mobazoo.attention.problem import Problem
from mobazoo.attention.routing import Routes
from mobazoo.attention.segments import Segments
from mobazoo.attention.triton_runs import refuses


def unsupported(problem: Problem) -> str | None:
    """CUDA in float32, float16 and bfloat16 with head dims up to 256; a CPU under the interpreter."""
    return refuses(problem.device, problem.dtype, problem.head_dim)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Segments,
    routes: Routes | None,
    q_start: int | Tensor,
    scale: float,
) -> Tensor:
    """Attention over ``routes`` (None: the whole document); see ``attend`` for shapes."""
    return _triton(q, k, v, segments, routes, q_start, scale)


def _layout(q: Tensor, k: Tensor, layout: Layout) -> Any:
    begin, index, start = layout.q_start, layout.index, layout.start
    if isinstance(begin, Tensor):
        begin = begin.to(q.device, torch.int64).reshape(1)
    else:
        begin = torch.full((1,), begin, dtype=torch.int64, device=q.device)
    if index is None or start is None or not (index.shape[3] and start.shape[1]):
        index = start = None  # nothing is routed
    else:
        start = start.to(torch.int32).contiguous()  # a table that all rows share is expanded
    known = import_module("mobazoo.attention.kernels.triton_slabs").Layout
    return known(layout.doc, layout.pos, index, start, begin, layout.block_size, k.shape[1], q.shape[2])


def _forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, _: str) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return _kernels().forward(q, k, v, _layout(q, k, layout), scale)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float, _: str
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v = dense(dout, q, k, v)  # a compiler may have copied them
    with torch.cuda.device_of(q):
        return _kernels().backward(dout, q, k, v, out.contiguous(), lse, _layout(q, k, layout), scale)


def _kernels() -> Any:
    """Imports triton, which takes a second and may not be there."""
    return import_module("mobazoo.attention.kernels.triton_launch")


_triton = operator("triton", _forward, _backward)
