"""Full and block attention by flash kernels: an own-block pass and a routed pass, merged by log-sum-exp.

One opaque operator each way, so that a fullgraph model may use it; the schedule and the kernel are chosen by device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mobazoo.attention.kernels import cpu, providers, varlen
from mobazoo.attention.problem import Problem
from mobazoo.attention.routing import Routes
from mobazoo.attention.segments import Segments


def unsupported(problem: Problem) -> str | None:
    """A CPU in any floating dtype; CUDA in float16 and bfloat16 with head dims up to 256."""
    if problem.device == "cpu":
        return None
    return providers.unsupported(problem.device, problem.dtype, problem.head_dim)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Segments,
    routes: Routes | None,
    q_start: int | Tensor,
    scale: float,
    provider: str = providers.AUTO,
) -> Tensor:
    """Attention over ``routes`` (None: the whole document); see ``attend`` for shapes.

    ``provider`` names a CUDA kernel for tests and benchmarks, see ``kernels.providers``; a CPU has one.
    """
    # Kernels read a head's numbers side by side; the CPU's backward fails on anything else.
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    out, _ = torch.ops.mobazoo.flash(
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
        segments.max_docs,
        segments.max_len,
        segments.whole,
        provider,
    )
    return out


@torch.library.custom_op("mobazoo::flash", mutates_args=())
def _flash(
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
    max_docs: int,
    max_len: int,
    whole: bool,
    provider: str,
) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        first = q_start if q_start_tensor is None else int(q_start_tensor)
        return cpu.forward(q, k, v, index, start, doc, pos, first, block_size, scale)
    begin = q_start if q_start_tensor is None else q_start_tensor
    layout = varlen.Layout(doc, pos, index, start, begin, block_size, max_docs, max_len, whole)
    return varlen.forward(q, k, v, layout, scale, providers.get(provider, q.device.type, q.dtype, q.shape[3]))


@_flash.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _rows_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("mobazoo::flash_backward", mutates_args=())
def _flash_backward(
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
    max_docs: int,
    max_len: int,
    whole: bool,
    provider: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        first = q_start if q_start_tensor is None else int(q_start_tensor)
        return cpu.backward(dout, q, k, v, out, lse, index, start, doc, pos, first, block_size, scale)
    begin = q_start if q_start_tensor is None else q_start_tensor
    layout = varlen.Layout(doc, pos, index, start, begin, block_size, max_docs, max_len, whole)
    kernel = providers.get(provider, q.device.type, q.dtype, q.shape[3])
    return varlen.backward(dout, q, k, v, out, lse, layout, scale, kernel)


@_flash_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _rows_like(q), _rows_like(k), _rows_like(v)


def _rows_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, start, doc, pos, q_start, q_start_tensor, *plain = inputs
    ctx.save_for_backward(q, k, v, *output, index, start, doc, pos, q_start_tensor)
    ctx.q_start, ctx.plain = q_start, plain


def _gradient(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, q_start_tensor = ctx.saved_tensors
    grads = torch.ops.mobazoo.flash_backward(dout, *tensors, ctx.q_start, q_start_tensor, *ctx.plain)
    return *grads, *[None] * 12


torch.library.register_autograd("mobazoo::flash", _gradient, setup_context=_setup)
