"""Opaque operators around a schedule: a forward and a backward that autograd and a fullgraph compile do not look into.

What a schedule has to know travels as plain arguments, since operators take tensors and numbers only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.kernels.slabs import dense
from mobazoo.attention.routing import Routes
from mobazoo.attention.segments import Segments

_PLAIN = (
    "Tensor? index, Tensor? start, Tensor doc, Tensor pos, SymInt q_start, Tensor? q_start_tensor, SymInt block_size, "
    "float scale, SymInt max_docs, SymInt max_len, bool whole, str provider"
)

# q, k, v, layout, scale, provider -> output [B, Hq, T, D], at least float32 log-sum-exp [B, Hq, T], both contiguous
Forward = Callable[[Tensor, Tensor, Tensor, Layout, float, str], tuple[Tensor, Tensor]]
# dout, q, k, v, output, log-sum-exp, layout, scale, provider -> contiguous gradients of q, k and v
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Layout, float, str], tuple[Tensor, Tensor, Tensor]]


def operator(name: str, forward: Forward, backward: Backward) -> Callable[..., Tensor]:
    """Registers ``mobazoo::{name}`` and ``mobazoo::{name}_backward``.

    Args:
        name: of the operator.
        forward: the schedule.
        backward: its gradients.

    Returns:
        ``(q, k, v, segments, routes, q_start, scale, provider="") -> out``, differentiable in ``q``, ``k`` and ``v``;
        shapes as in ``attend``, ``routes`` None is full attention inside documents.
    """

    def forward_on_plain(q: Tensor, k: Tensor, v: Tensor, *plain: Any) -> tuple[Tensor, Tensor]:
        return forward(q, k, v, *_from_plain(*plain))

    def backward_on_plain(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        dout, q, k, v, out, lse, *plain = given
        return backward(dout, q, k, v, out, lse, *_from_plain(*plain))

    defined = torch.library.custom_op(
        f"mobazoo::{name}",
        forward_on_plain,
        mutates_args=(),
        schema=f"(Tensor q, Tensor k, Tensor v, {_PLAIN}) -> (Tensor, Tensor)",
    )
    defined_backward = torch.library.custom_op(
        f"mobazoo::{name}_backward",
        backward_on_plain,
        mutates_args=(),
        schema=(
            f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PLAIN}) -> (Tensor, Tensor, Tensor)"
        ),
    )

    @defined.register_fake
    def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))

    @defined_backward.register_fake
    def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in (q, k, v))

    def gradient(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, q_start_tensor = ctx.saved_tensors
        grads = backward_op(dout, *tensors, ctx.q_start, q_start_tensor, *ctx.rest)
        return *grads, *[None] * (6 + len(ctx.rest))

    defined.register_autograd(gradient, setup_context=_keep)
    forward_op, backward_op = (getattr(torch.ops.mobazoo, each) for each in (name, f"{name}_backward"))

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        routes: Routes | None,
        q_start: int | Tensor,
        scale: float,
        provider: str = "",
    ) -> Tensor:
        at = (0, q_start) if isinstance(q_start, Tensor) else (q_start, None)
        index, start, block_size = (routes.index, routes.start, routes.block_size) if routes else (None, None, 0)
        doc, pos, known = segments.doc, segments.pos, (segments.max_docs, segments.max_len, segments.whole)
        q, k, v = dense(q, k, v)
        out, _ = forward_op(q, k, v, index, start, doc, pos, *at, block_size, scale, *known, provider)
        return out

    return attend


def _from_plain(
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
) -> tuple[Layout, float, str]:
    first = q_start if q_start_tensor is None else q_start_tensor
    return Layout(doc, pos, index, start, first, block_size, max_docs, max_len, whole), scale, provider


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, start, doc, pos, q_start, q_start_tensor, *rest = inputs
    ctx.save_for_backward(q, k, v, *output, index, start, doc, pos, q_start_tensor)
    ctx.q_start, ctx.rest = q_start, rest
