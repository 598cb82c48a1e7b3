"""The flash schedule on a GPU: two varlen kernel calls a slab, no waiting for the device, static shapes.

A slab is some rows and key heads, or a range of query tokens of one. Its own-block pass is one causal call over
the blocks as runs of keys. Its routed pass gathers the queries by the block they chose and is one call over those
blocks, in place. Both results are merged by their log-sum-exps in float32. The backward walks the same slabs and gives
the merged output and log-sum-exp to the kernel's backward, so that no gradient of a log-sum-exp is ever needed.
Sums go through the inverse permutation, never through atomics of ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mobazoo.attention.kernels.fit import Provider
from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.kernels.sequences import Routed, Sequences, own_sequences, read_keys, routed_sequences
from mobazoo.attention.kernels.slabs import Shape, Slab, is_flat, slabs

_NOTHING = float("-inf")  # log-sum-exp of a query that reads nothing


class Pass(NamedTuple):
    """One kernel call's keys: slots ``span`` of the slab's pairs as ``[P * L, 1, D]`` tokens."""

    keys: Tensor
    values: Tensor
    span: slice
    sequences: Sequences


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, provider: Provider) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, T, D]`` and log-sum-exp ``[B, Hq, T]``, contiguous; padding gets zeros and -inf.

    Args:
        q: ``[B, Hq, T, D]`` of a dtype the provider takes, any strides.
        k: ``[B, Hkv, S, D]``, read in place where its strides allow.
        v: like ``k``.
        layout: documents and routes.
        scale: of the scores.
        provider: the kernel.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    shape, flat = _shape(q, k, layout), is_flat(k) and is_flat(v)
    for group in slabs(shape, flat=flat, backward=False):
        for slab in group:
            queries = q[slab.rows, slab.queries, slab.tokens]
            own = _own_pass(k, v, layout, slab, flat)
            part, stats = _attend(provider, _by_token(queries, slab.pairs), own, scale)
            merged, merged_lse = _from_token(part, slab.pairs), _from_token(stats.mT, slab.pairs)  # [P, G, t(, D)]
            real = _real(layout, slab)  # [P, 1, t]
            merged = torch.where(real[..., None], merged, 0.0).to(wide)
            merged_lse = torch.where(real, merged_lse, _NOTHING).to(wide)
            if shape.parts:
                routed_pass, routed = _routed_pass(k, v, layout, slab, flat, real)
                gathered = _rows(queries).index_select(0, routed.order // shape.parts)
                part, stats = _attend(provider, gathered[:, None], routed_pass, scale)
                merged, merged_lse = _merge(merged, merged_lse, part[:, 0], stats[0], routed)
            out[slab.rows, slab.queries, slab.tokens] = merged.reshape(queries.shape).to(q.dtype)
            lse[slab.rows, slab.queries, slab.tokens] = merged_lse.reshape(queries.shape[:3])
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    scale: float,
    provider: Provider,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``, contiguous; kernel results are summed in float32 and rounded once.

    Args:
        dout: ``[B, Hq, T, D]``, any strides.
        q: as in the forward, and so ``k``, ``v``, ``layout`` and ``scale``.
        k: see ``q``.
        v: see ``q``.
        out: the forward's output.
        lse: the forward's log-sum-exp.
        layout: see ``q``.
        scale: see ``q``.
        provider: the kernel.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    shape, flat = _shape(q, k, layout), is_flat(k) and is_flat(v)
    for group in slabs(shape, flat=flat, backward=True):
        rows, heads = group[0].rows, group[0].heads
        sums = tuple(torch.zeros(x[rows, heads].shape, dtype=wide, device=x.device) for x in (k, v))
        for slab in group:
            at = (slab.rows, slab.queries, slab.tokens)
            tensors, stats, real = [x[at] for x in (dout, q, out)], lse[at], _real(layout, slab)
            own = _own_pass(k, v, layout, slab, flat)
            by_token = [_by_token(x, slab.pairs) for x in tensors]
            part = _gradient(provider, by_token, _by_token(stats, slab.pairs).mT, own, sums, scale)
            summed = torch.where(real[..., None], _from_token(part, slab.pairs), 0.0).to(wide)
            if shape.parts:
                routed_pass, routed = _routed_pass(k, v, layout, slab, flat, real)
                row = routed.order // shape.parts
                gathered = [_rows(x).index_select(0, row)[:, None] for x in tensors]
                gathered_stats = stats.flatten().index_select(0, row)[None]
                part = _gradient(provider, gathered, gathered_stats, routed_pass, sums, scale)
                for i in range(shape.parts):
                    summed += torch.where(routed.chosen[..., i, None], part[:, 0][routed.place[..., i]], 0.0)
            dq[at] = summed.reshape(tensors[0].shape).to(q.dtype)
        dk[rows, heads], dv[rows, heads] = sums
    return dq, dk, dv


def _shape(q: Tensor, k: Tensor, layout: Layout) -> Shape:
    return Shape(
        batch=q.shape[0],
        key_heads=k.shape[1],
        group=q.shape[1] // k.shape[1],
        queries=q.shape[2],
        slots=k.shape[2],
        dim=q.shape[3],
        itemsize=q.element_size(),
        parts=0 if layout.index is None or layout.start is None or not layout.start.shape[1] else layout.index.shape[3],
        blocks=0 if layout.start is None else layout.start.shape[1],
        block_size=layout.block_size,
        max_docs=layout.max_docs,
        whole=layout.whole,
    )


def _rows(x: Tensor) -> Tensor:
    """``[R, Hq, t, D]`` as ``[P * G * t, D]``."""
    return x.reshape(-1, x.shape[-1])


def _by_token(x: Tensor, pairs: int) -> Tensor:
    """``[R, Hq, t, ...]`` as ``[P * t, G, ...]``: a view where there is one pair."""
    grouped = x.reshape(pairs, -1, *x.shape[2:]) if pairs > 1 else x[0][None]
    return grouped.transpose(1, 2).flatten(0, 1)


def _from_token(x: Tensor, pairs: int) -> Tensor:
    """``[P * t, G, ...]`` as ``[P, G, t, ...]``."""
    return x.unflatten(0, (pairs, -1)).transpose(1, 2)


def _real(layout: Layout, slab: Slab) -> Tensor:
    """``[P, 1, t]`` bool, which queries are no padding."""
    slot = torch.arange(slab.tokens.start, slab.tokens.stop, device=layout.doc.device) + layout.q_start
    real = layout.doc[slab.rows].index_select(1, slot) >= 0
    return real.repeat_interleave(slab.pairs // real.shape[0], dim=0)[:, None]


def _pass(k: Tensor, v: Tensor, slab: Slab, span: slice, flat: bool) -> tuple[Tensor, Tensor, slice]:
    """Keys and values of the slots ``span``, or of all slots where only those can be read in place."""
    if flat and slab.pairs > 1:
        span = slice(0, k.shape[2])
    keys, values = (x[slab.rows, slab.heads, span].reshape(-1, 1, x.shape[3]) for x in (k, v))
    return keys, values, span


def _own_pass(k: Tensor, v: Tensor, layout: Layout, slab: Slab, flat: bool) -> Pass:
    first, queries = layout.q_start + slab.tokens.start, slab.tokens.stop - slab.tokens.start
    span = slice(0, k.shape[2])
    if isinstance(first, int):  # else the host cannot know
        reach = layout.block_size or layout.max_len
        span = slice(max(0, first - max(reach - 1, 0)), first + queries)
    keys, values, span = _pass(k, v, slab, span, flat)
    sequences = own_sequences(
        layout.doc[slab.rows, span],
        layout.pos[slab.rows, span],
        first - span.start,
        queries,
        slab.heads.stop - slab.heads.start,
        layout.block_size,
        layout.max_docs,
        layout.max_len,
    )
    return Pass(keys, values, span, sequences)


def _routed_pass(k: Tensor, v: Tensor, layout: Layout, slab: Slab, flat: bool, real: Tensor) -> tuple[Pass, Routed]:
    assert layout.index is not None  # for the type checker: there are parts
    assert layout.start is not None
    end = layout.q_start + slab.tokens.stop
    reach = end if isinstance(end, int) else k.shape[2]
    keys, values, span = _pass(k, v, slab, slice(0, reach), flat)
    # Blocks stand in slot order, and what a query reads ends before its own block.
    blocks = min(layout.start.shape[1], reach // layout.block_size)
    routed = routed_sequences(
        layout.index[slab.rows, slab.queries, slab.tokens],
        real,
        layout.start[slab.rows, :blocks],
        span.stop,
        slab.heads.stop - slab.heads.start,
        layout.block_size,
        whole=layout.whole,
    )
    return Pass(keys, values, span, routed.sequences), routed


def _attend(provider: Provider, q: Tensor, to: Pass, scale: float) -> tuple[Tensor, Tensor]:
    return provider.forward(q, to.keys, to.values, to.sequences, scale)


def _gradient(
    provider: Provider, rows: list[Tensor], lse: Tensor, to: Pass, sums: tuple[Tensor, ...], scale: float
) -> Tensor:
    """Gradient of the queries; those of keys and values are added to ``sums`` [R, h, S, D] in place."""
    dout, q, out = rows
    dq, *parts = provider.backward(dout, q, to.keys, to.values, out, lse, to.sequences, scale)
    read = read_keys(to.sequences, to.keys.shape[0])[:, None, None]
    for total, part in zip(sums, parts, strict=True):
        piece = total[:, :, to.span]
        piece += torch.where(read, part, 0.0).reshape(piece.shape)
    return dq


def _merge(own: Tensor, own_lse: Tensor, part: Tensor, stats: Tensor, routed: Routed) -> tuple[Tensor, Tensor]:
    """One softmax over the own block ``[P, G, t, D]`` and the blocks read ``part`` [E, D], in float32."""
    of_blocks = torch.where(routed.chosen, stats[routed.place], _NOTHING)
    each = torch.cat([own_lse[..., None], of_blocks], dim=-1)  # [P, G, t, K]
    lse = each.logsumexp(-1)
    weight = (each - torch.where(lse == _NOTHING, 0.0, lse)[..., None]).exp()
    merged = own * weight[..., :1]
    for i in range(of_blocks.shape[-1]):
        read = torch.where(routed.chosen[..., i, None], part[routed.place[..., i]], 0.0)
        merged.addcmul_(read.to(merged.dtype), weight[..., i + 1, None])
    return merged, lse
