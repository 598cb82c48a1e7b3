"""Short documents on a CPU: all scores, and a mask over the blocks that a query did not choose.

Where few blocks are left out, or blocks are so small that each has few readers, this takes less time than to gather
the readers of every block and to merge what they read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mobazoo.attention.kernels.cpu_own import STRIP, Document, backward_kernel, forward_kernel, strip_mask

# Tokens of a document up to which this is considered, and entries of a call's mask, which should stay in cache.
_MOST_TOKENS = 2048
_ENTRIES = 1 << 20
# What the time of one call for the readers of a block, beside its scores, is worth in scores.
_CALL = 20_000


class Short(NamedTuple):
    """Queries of one short document that may choose."""

    first: int  # the document's first slot
    start: int  # slot of the first query
    stop: int
    block: int  # number of the document's first block in its row


def short_documents(
    over: list[Document], begins: Tensor, early: int, block_size: int, top_k: int, group: int, q_start: int, q_stop: int
) -> list[Short]:
    """Those of a row whose queries, from the document's token ``early`` on, had better take a mask.

    ``begins`` is the row's ``Routes.start [N]``; queries are at slots ``q_start`` to ``q_stop - 1``, ``group`` heads
    to a key head.
    """
    known: list[int] = []
    found = []
    for first, stop in over:
        lo, hi = max(first + early, q_start), min(stop, q_stop)
        if lo < hi and stop - first <= _MOST_TOKENS and _pays(stop - first, block_size, top_k, group):
            known = known or [begin for begin in begins.tolist() if begin >= 0]
            found.append(Short(first, lo, hi, bisect_left(known, first)))
    return found


def _pays(length: int, block_size: int, top_k: int, group: int) -> bool:
    """Whether a document's queries that may choose take less time with a mask than block by block.

    It looks at whole documents only, so that both passes decide alike however a row is cut.
    """
    early = min(top_k * block_size, length)
    queries = group * (length - early)
    masked = queries * (early + length) / 2
    routed = queries * top_k * block_size + length // block_size * _CALL
    return masked < routed


class Strip(NamedTuple):
    """Some queries of some key heads, the keys up to theirs, and who reads which."""

    heads: slice
    queries: slice  # from the first query of the piece
    keys: slice
    mask: Tensor  # [h, G, queries, keys]; the next strip's takes its place


def strips(short: Short, q_start: int, index: Tensor, block_size: int, dtype: torch.dtype) -> Iterator[Strip]:
    """The work of ``short``; ``index [h, G, T, K - 1]`` is of ``Routes``, its queries start at slot ``q_start``."""
    heads, group, _, _ = index.shape
    width = -(-(short.stop - short.first) // block_size) * block_size  # keys, in whole blocks
    count = min(STRIP, short.stop - short.start, max(1, _ENTRIES // (group * width)))
    together = min(heads, max(1, _ENTRIES // (group * count * width)))  # key heads of a call
    room = torch.empty(together * group * count * width, dtype=dtype)
    later = strip_mask(count, count, 1, dtype)
    rows = slice(short.start - q_start, short.stop - q_start)
    for some in (slice(head, head + together) for head in range(0, heads, together)):
        chosen = _chosen(short, index[some, :, rows], block_size, dtype)
        for start in range(short.start, short.stop, count):
            stop = min(start + count, short.stop)
            queries = stop - start
            mask = _mask(chosen[:, :, start - short.start : stop - short.start], stop - short.first, block_size, room)
            mask[..., -queries:] += later[-queries:, -queries:]
            yield Strip(some, slice(start - q_start, stop - q_start), slice(short.first, stop), mask)


def masked_forward(strip: Strip, rowwise: list[Tensor], k: Tensor, v: Tensor, scale: float) -> None:
    """Writes a strip's output and log-sum-exp.

    ``rowwise`` is q and output ``[h, G, T, D]`` and log-sum-exp ``[h, G, T]``; ``k`` and ``v`` are ``[h, S, D]``.
    """
    some, at, seen, mask = strip
    queries, out, lse = (x[some, :, at] for x in rowwise)
    keys, values = k[some, None, seen], v[some, None, seen]
    # Heads of a group as one: a call of many queries takes less time for each.
    mask = mask.flatten(1, 2)[:, None]
    part, part_lse = forward_kernel(
        queries.flatten(1, 2)[:, None], keys, values, 0.0, False, attn_mask=mask, scale=scale
    )
    out.copy_(part.view(out.shape))
    lse.copy_(part_lse.view(lse.shape))


def masked_backward(
    strip: Strip, rowwise: list[Tensor], k: Tensor, v: Tensor, lse: Tensor, grads: list[Tensor], scale: float
) -> None:
    """Adds one key head's gradients: ``rowwise`` is dout, q and out ``[G, T, D]``, ``grads`` of q, k and v.

    ``k [S, D]``, ``v``, ``lse [G, T]`` and ``grads`` are float32 or wider.
    """
    _, at, seen, mask = strip
    dout, q, out = (x[None, :, at].to(k.dtype).contiguous() for x in rowwise)
    group, keys, values = len(lse), k[None, None, seen], v[None, None, seen]
    parts = backward_kernel(
        dout,
        q,
        keys.expand(-1, group, -1, -1),
        values.expand(-1, group, -1, -1),
        out,
        lse[None, :, at].contiguous(),
        0.0,
        False,
        attn_mask=mask,
        scale=scale,
    )
    dq, dk, dv = (part[0] for part in parts)
    grads[0][:, at] += dq
    grads[1][seen] += dk.sum(0)
    grads[2][seen] += dv.sum(0)


def _chosen(short: Short, index: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """``[h, G, queries, blocks]``: 0 for the document's blocks that a query reads, -inf for the others.

    ``index [h, G, queries, K - 1]`` is of ``Routes``.
    """
    own = torch.arange(short.start - short.first, short.stop - short.first) // block_size
    # The first place is for entries that name no block.
    chosen = torch.full((*index.shape[:3], 2 + int(own[-1])), -torch.inf, dtype=dtype)
    chosen.scatter_(3, (index.long() - (short.block - 1)).clamp_(0), 0.0)
    chosen.scatter_(3, (own + 1).expand(index.shape[:3])[..., None], 0.0)
    return chosen[..., 1:]


def _mask(chosen: Tensor, keys: int, block_size: int, room: Tensor) -> Tensor:
    """``[h, G, queries, keys]`` of ``chosen [h, G, queries, blocks]``, in ``room``."""
    blocks = -(-keys // block_size)
    shape = (*chosen.shape[:3], blocks, block_size)
    mask = room[: prod(shape)].view(shape)
    mask.copy_(chosen[..., :blocks, None].expand(shape))
    return mask.flatten(3)[..., :keys]
