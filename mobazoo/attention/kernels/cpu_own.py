"""Own-block work of the flash schedule on a CPU: contiguous, causal, so it needs no gather, only large equal pieces."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Query rows of one kernel call: its buffers should stay in cache, and bound the working memory.
TOKENS_PER_CALL = 8192
# The kernel's causal tiles are coarse at these lengths: two causal halves and one dense corner take less time.
_HALVED = range(256, 768)


@dataclass(frozen=True, slots=True)
class Tile:
    """``count`` equal pieces of own-block work, ``stride`` slots apart: queries and keys are runs of slots."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    stride: int
    count: int
    causal: bool  # the diagonal, which comes first for every query; the rest is merged into it


def own_tiles(doc: Tensor, pos: Tensor, block_size: int | None, dense: int, q_start: int, q_stop: int) -> list[Tile]:
    """The own-block work (own-document, without ``block_size``) of the queries at slots ``q_start .. q_stop - 1``.

    ``doc`` and ``pos`` are one row's ``[S]``; the first ``dense`` tokens of a document count as one block. Equal
    neighbours become one tile of many pieces, at most ``TOKENS_PER_CALL`` slots together.
    """
    first = (pos == 0) if block_size is None else (pos % block_size == 0) & ((pos == 0) | (pos >= dense))
    turn = torch.ones_like(first)
    turn[1:] = (doc[1:] != doc[:-1]) | first[1:]
    starts = turn.nonzero().flatten()
    bounds = [*starts.tolist(), doc.shape[0]]
    real = (doc[starts] >= 0).tolist()
    tiles: list[Tile] = []
    run = (0, 0, 0)  # start, length, count of equal neighbours not yet turned into tiles
    for (k_start, k_stop), is_real in zip(pairwise(bounds), real, strict=True):
        q_lo, q_hi = max(k_start, q_start), min(k_stop, q_stop)
        if not is_real or q_lo >= q_hi:
            continue
        begin, length, count = run
        if length == q_hi - q_lo and begin + length * count == q_lo and length * (count + 1) <= TOKENS_PER_CALL:
            run = (begin, length, count + 1)
        else:
            tiles += _diagonal(*run)
            run = (q_lo, q_hi - q_lo, 1)
        if q_lo > k_start:  # the block began before the queries do
            tiles += _diagonal(*run)
            run = (0, 0, 0)
            tiles.append(Tile(q_lo, q_hi - q_lo, k_start, q_lo - k_start, 0, 1, causal=False))
    return tiles + _diagonal(*run)


def _diagonal(start: int, length: int, count: int) -> list[Tile]:
    if not count:
        return []
    if length % 2 or length not in _HALVED:
        return [Tile(start, length, start, length, length, count, causal=True)]
    half = length // 2
    corner = Tile(start + half, half, start, half, length, count, causal=False)
    return [*_diagonal(start, half, 2 * count), corner]


def pieces_of(x: Tensor, start: int, length: int, tile: Tile) -> Tensor:
    """A tile's pieces: view of ``x`` [..., slots, D] as ``[..., count, length, D]``."""
    stop = start + tile.stride * (tile.count - 1) + length
    return x[..., start:stop, :].unfold(-2, length, max(tile.stride, 1)).mT


def own_forward(
    tile: Tile, q_start: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> None:
    """One tile of one key head: the diagonal is written to ``out [G, T, D]`` and ``lse [G, T]``, the rest merged."""
    group, _, dim = q.shape
    offset = tile.q_start - q_start
    queries = pieces_of(q, offset, tile.q_len, tile).transpose(0, 1)  # [count, G, q_len, D]
    keys = pieces_of(k, tile.k_start, tile.k_len, tile)[:, None]  # [count, 1, k_len, D]
    values = pieces_of(v, tile.k_start, tile.k_len, tile)[:, None]
    merged = pieces_of(out, offset, tile.q_len, tile)  # [G, count, q_len, D]
    stats = pieces_of(lse[..., None], offset, tile.q_len, tile)[..., 0]
    if tile.causal:
        own, own_lse = forward_kernel(
            queries, keys.expand(-1, group, -1, -1), values.expand(-1, group, -1, -1), 0.0, True, scale=scale
        )
        merged.copy_(own.transpose(0, 1))
        stats.copy_(own_lse.transpose(0, 1))
        return
    folded = queries.reshape(tile.count, 1, group * tile.q_len, dim)
    part, part_lse = forward_kernel(folded, keys, values, 0.0, False, scale=scale)
    part = part.view(queries.shape).transpose(0, 1)
    part_lse = part_lse.view(queries.shape[:3]).transpose(0, 1)
    merged.lerp_(part, (part_lse - stats).sigmoid_()[..., None])
    stats.copy_(torch.logaddexp(stats, part_lse))


def own_backward(
    tile: Tile,
    q_start: int,
    rowwise: list[Tensor],
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grads: list[Tensor],
    scale: float,
) -> None:
    """One tile of one key head: from ``rowwise`` (dout, q, out, each ``[G, T, D]``) into ``grads`` (of q, k, v).

    ``k``, ``v`` and ``grads`` are float32 or wider.
    """
    offset = tile.q_start - q_start
    # In float32 whatever the dtype: on short pieces the kernel is slower in a narrow one, and its sums are rounded.
    dout, q, out = (
        pieces_of(x, offset, tile.q_len, tile)
        .transpose(0, 1)
        .to(k.dtype, memory_format=torch.contiguous_format)
        .contiguous()
        for x in rowwise
    )
    group = q.shape[1]
    keys = pieces_of(k, tile.k_start, tile.k_len, tile)[:, None].expand(-1, group, -1, -1)  # [count, G, k_len, D]
    values = pieces_of(v, tile.k_start, tile.k_len, tile)[:, None].expand(-1, group, -1, -1)
    stats = pieces_of(lse[..., None], offset, tile.q_len, tile)[..., 0].transpose(0, 1).contiguous()
    dq, dk, dv = backward_kernel(dout, q, keys, values, out, stats, 0.0, tile.causal, scale=scale)
    dq_wide, dk_wide, dv_wide = grads
    pieces_of(dq_wide, offset, tile.q_len, tile).add_(dq.transpose(0, 1))
    pieces_of(dk_wide, tile.k_start, tile.k_len, tile).add_(dk.sum(1, dtype=dk_wide.dtype))
    pieces_of(dv_wide, tile.k_start, tile.k_len, tile).add_(dv.sum(1, dtype=dv_wide.dtype))
