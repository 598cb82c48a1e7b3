"""Full and block attention by our own Triton kernels: queries are gathered inside the kernel. See docs/kernels.md.

Not chosen by ``auto``: it has not been measured on a GPU. On a CPU it runs under Triton's interpreter, which checks
the kernels and is slow.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mobazoo.attention.kernels.triton_runs import refuses
from mobazoo.attention.problem import Problem
from mobazoo.attention.routing import Routes
from mobazoo.attention.segments import Segments


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
    q, k, v = (_dense(x) for x in (q, k, v))
    out, _ = torch.ops.mobazoo.triton(
        q,
        k,
        v,
        routes.index if routes else None,
        routes.start if routes else None,
        segments.doc,
        segments.pos,
        0 if isinstance(q_start, Tensor) else q_start,
        q_start if isinstance(q_start, Tensor) else None,
        routes.block_size if routes else 0,
        scale,
    )
    return out


def _dense(x: Tensor) -> Tensor:
    """Kernels read a head's numbers side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _layout(
    q: Tensor,
    k: Tensor,
    index: Tensor | None,
    start: Tensor | None,
    doc: Tensor,
    pos: Tensor,
    q_start: int,
    q_start_tensor: Tensor | None,
    block_size: int,
) -> Any:
    if q_start_tensor is None:
        begin = torch.full((1,), q_start, dtype=torch.int64, device=q.device)
    else:
        begin = q_start_tensor.to(q.device, torch.int64).reshape(1)
    if index is None or start is None or not (index.shape[3] and start.shape[1]):
        index = start = None  # nothing is routed
    else:
        start = start.to(torch.int32).contiguous()  # a table that all rows share is expanded
    layout = import_module("mobazoo.attention.kernels.triton_slabs").Layout
    return layout(doc, pos, index, start, begin, block_size, k.shape[1], q.shape[2])


@torch.library.custom_op("mobazoo::triton", mutates_args=())
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    start: Tensor | None,
    doc: Tensor,
    pos: Tensor,
    q_start: int,
    q_start_tensor: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    layout = _layout(q, k, index, start, doc, pos, q_start, q_start_tensor, block_size)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return _kernels().forward(q, k, v, layout, scale)


@_triton.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("mobazoo::triton_backward", mutates_args=())
def _triton_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Tensor | None,
    start: Tensor | None,
    doc: Tensor,
    pos: Tensor,
    q_start: int,
    q_start_tensor: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout(q, k, index, start, doc, pos, q_start, q_start_tensor, block_size)
    with torch.cuda.device_of(q):
        return _kernels().backward(_dense(dout), _dense(q), _dense(k), _dense(v), out.contiguous(), lse, layout, scale)


@_triton_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _kernels() -> Any:
    """Imports triton, which takes a second and may not be there."""
    return import_module("mobazoo.attention.kernels.triton_launch")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, start, doc, pos, q_start, q_start_tensor, *plain = inputs
    ctx.save_for_backward(q, k, v, *output, index, start, doc, pos, q_start_tensor)
    ctx.q_start, ctx.plain = q_start, plain


def _gradient(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, q_start_tensor = ctx.saved_tensors
    grads = torch.ops.mobazoo.triton_backward(dout, *tensors, ctx.q_start, q_start_tensor, *ctx.plain)
    return *grads, *[None] * 8


torch.library.register_autograd("mobazoo::triton", _gradient, setup_context=_setup)
