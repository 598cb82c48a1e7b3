"""The flash schedule on a CPU: one key head at a time, each partial result merged in place while it is in cache.

For a row and a key head, every query first reads its own block (its document, for full attention) causally. Then,
block by block, the queries of the whole group that chose the block are gathered, attend to it in one kernel call,
and are folded into the running output. The backward walks the same work with the merged output and log-sum-exp, so
that no gradient of a log-sum-exp is ever needed. Working memory beyond the result: float32 copies of one key head's
queries, output and gradients, plus ``_TOKENS_PER_CALL`` rows a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mobazoo.attention.heap import keep_heap

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Query rows of one kernel call: its buffers should stay in cache, and bound the working memory.
_TOKENS_PER_CALL = 8192
# Below this many rows a thread, splitting a call over the threads costs more than it gives.
_ROWS_PER_THREAD = 128
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


class Heads(NamedTuple):
    """One row's work for one key head and the query heads of its group."""

    row: int
    key: int
    queries: slice


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    start: Tensor | None,
    doc: Tensor,
    pos: Tensor,
    q_start: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, T, D]`` and log-sum-exp ``[B, Hq, T]``; without ``index`` full attention inside documents."""
    keep_heap()
    batch, hq, length, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(batch, hq, length, dim)
    lse = torch.full((batch, hq, length), float("-inf"), dtype=wide, device=q.device)
    for heads, tiles in _work(q, k, doc, pos, q_start, block_size, index is not None):
        b, j, g = heads
        queries, keys, values = q[b, g].contiguous(), k[b, j], v[b, j]
        # float32 results are merged where they belong, narrower ones in a wide copy that is rounded once
        merged = out[b, g] if q.dtype == wide else queries.new_empty(queries.shape, dtype=wide)
        merged.index_fill_(1, (doc[b, q_start : q_start + length] < 0).nonzero().flatten(), 0.0)
        for tile in tiles:
            _own_forward(tile, q_start, queries, keys, values, merged, lse[b, g], scale)
        if index is not None and start is not None:
            flat = queries.flatten(0, 1)
            flat_merged, flat_lse = merged.flatten(0, 1), lse[b, g].flatten()
            for rows, k0 in _routed(index[b, g], start[b], _TOKENS_PER_CALL):
                rows, parts, _ = _even(rows)
                block = slice(k0, k0 + block_size)
                part_out, part_lse = _forward_kernel(
                    flat.index_select(0, rows).view(parts, 1, -1, dim),
                    keys[block].expand(parts, 1, -1, -1),
                    values[block].expand(parts, 1, -1, -1),
                    0.0,
                    False,
                    scale=scale,
                )
                _merge_rows(flat_merged, flat_lse, rows, part_out.view(-1, dim), part_lse.flatten())
        if merged.dtype != out.dtype:
            out[b, g] = merged.to(out.dtype)
    return out, lse


def backward(
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
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``, accumulated in float32 and rounded once."""
    keep_heap()
    dim = q.shape[3]
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for heads, tiles in _work(q, k, doc, pos, q_start, block_size, index is not None):
        b, j, g = heads
        rowwise = [x[b, g].contiguous() for x in (dout, q, out)]
        keys, values, stats = k[b, j], v[b, j], lse[b, g]
        dq_wide = rowwise[1].new_zeros(rowwise[1].shape, dtype=wide)
        dk_wide, dv_wide = keys.new_zeros(keys.shape, dtype=wide), keys.new_zeros(keys.shape, dtype=wide)
        for tile in tiles:
            _own_backward(tile, q_start, rowwise, keys, values, stats, (dq_wide, dk_wide, dv_wide), scale)
        if index is not None and start is not None:
            flat_dout, flat_q, flat_out = (x.flatten(0, 1) for x in rowwise)
            flat_lse, flat_dq = stats.flatten(), dq_wide.flatten(0, 1)
            for rows, k0 in _routed(index[b, g], start[b], _TOKENS_PER_CALL):
                rows, parts, extra = _even(rows)
                block = slice(k0, k0 + block_size)
                dout_rows = flat_dout.index_select(0, rows)
                if extra:
                    dout_rows[-extra:] = 0  # repeated rows must not count twice
                part_dq, part_dk, part_dv = _backward_kernel(
                    dout_rows.view(parts, 1, -1, dim),
                    flat_q.index_select(0, rows).view(parts, 1, -1, dim),
                    keys[block].expand(parts, 1, -1, -1),
                    values[block].expand(parts, 1, -1, -1),
                    flat_out.index_select(0, rows).view(parts, 1, -1, dim),
                    flat_lse.index_select(0, rows).view(parts, 1, -1),
                    0.0,
                    False,
                    scale=scale,
                )
                kept = rows.shape[0] - extra
                flat_dq.index_add_(0, rows[:kept], part_dq.view(-1, dim)[:kept].to(wide))
                dk_wide[block] += part_dk.sum((0, 1), dtype=wide)
                dv_wide[block] += part_dv.sum((0, 1), dtype=wide)
        dq[b, g], dk[b, j], dv[b, j] = dq_wide, dk_wide, dv_wide
    return dq, dk, dv


def _work(
    q: Tensor, k: Tensor, doc: Tensor, pos: Tensor, q_start: int, block_size: int, sparse: bool
) -> Iterator[tuple[Heads, list[Tile]]]:
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        tiles = own_tiles(doc[b], pos[b], block_size if sparse else None, q_start, q_start + q.shape[2])
        for j in range(k.shape[1]):
            yield Heads(b, j, slice(j * group, (j + 1) * group)), tiles


def own_tiles(doc: Tensor, pos: Tensor, block_size: int | None, q_start: int, q_stop: int) -> list[Tile]:
    """The own-block work (own-document, without ``block_size``) of the queries at slots ``q_start .. q_stop - 1``.

    ``doc`` and ``pos`` are one row's ``[S]``. Equal neighbours become one tile of many pieces, at most
    ``_TOKENS_PER_CALL`` slots together.
    """
    first = (pos == 0) if block_size is None else (pos % block_size == 0)
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
        if length == q_hi - q_lo and begin + length * count == q_lo and length * (count + 1) <= _TOKENS_PER_CALL:
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


def _pieces(x: Tensor, start: int, length: int, tile: Tile) -> Tensor:
    """View of ``x`` [..., slots, D] as ``[..., count, length, D]``."""
    stop = start + tile.stride * (tile.count - 1) + length
    return x[..., start:stop, :].unfold(-2, length, max(tile.stride, 1)).mT


def _own_forward(
    tile: Tile, q_start: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> None:
    group, _, dim = q.shape
    offset = tile.q_start - q_start
    queries = _pieces(q, offset, tile.q_len, tile).transpose(0, 1)  # [count, G, q_len, D]
    keys = _pieces(k, tile.k_start, tile.k_len, tile)[:, None]  # [count, 1, k_len, D]
    values = _pieces(v, tile.k_start, tile.k_len, tile)[:, None]
    merged = _pieces(out, offset, tile.q_len, tile)  # [G, count, q_len, D]
    stats = _pieces(lse[..., None], offset, tile.q_len, tile)[..., 0]
    if tile.causal:
        own, own_lse = _forward_kernel(
            queries, keys.expand(-1, group, -1, -1), values.expand(-1, group, -1, -1), 0.0, True, scale=scale
        )
        merged.copy_(own.transpose(0, 1))
        stats.copy_(own_lse.transpose(0, 1))
        return
    folded = queries.reshape(tile.count, 1, group * tile.q_len, dim)
    part, part_lse = _forward_kernel(folded, keys, values, 0.0, False, scale=scale)
    part = part.view(queries.shape).transpose(0, 1).to(merged.dtype)
    part_lse = part_lse.view(queries.shape[:3]).transpose(0, 1)
    merged.lerp_(part, (part_lse - stats).sigmoid_()[..., None])
    stats.copy_(torch.logaddexp(stats, part_lse))


def _own_backward(
    tile: Tile,
    q_start: int,
    rowwise: list[Tensor],
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    offset = tile.q_start - q_start
    dout, q, out = (_pieces(x, offset, tile.q_len, tile).transpose(0, 1).contiguous() for x in rowwise)
    group = q.shape[1]
    keys = _pieces(k, tile.k_start, tile.k_len, tile)[:, None].expand(-1, group, -1, -1)  # [count, G, k_len, D]
    values = _pieces(v, tile.k_start, tile.k_len, tile)[:, None].expand(-1, group, -1, -1)
    stats = _pieces(lse[..., None], offset, tile.q_len, tile)[..., 0].transpose(0, 1).contiguous()
    dq, dk, dv = _backward_kernel(dout, q, keys, values, out, stats, 0.0, tile.causal, scale=scale)
    dq_wide, dk_wide, dv_wide = grads
    _pieces(dq_wide, offset, tile.q_len, tile).add_(dq.transpose(0, 1))
    _pieces(dk_wide, tile.k_start, tile.k_len, tile).add_(dk.sum(1, dtype=dk_wide.dtype))
    _pieces(dv_wide, tile.k_start, tile.k_len, tile).add_(dv.sum(1, dtype=dv_wide.dtype))


def _routed(index: Tensor, start: Tensor, most: int) -> Iterator[tuple[Tensor, int]]:
    """For each block that is read: the rows ``g * T + t`` that chose it (ascending), and its first slot.

    ``index`` is ``[G, T, K - 1]``, ``start`` is ``[N]``. At most ``most`` rows at a time; a row comes once a block.
    """
    chosen, order = index.flatten().sort(stable=True)  # integers: a radix sort
    rows = order.div_(max(1, index.shape[-1]), rounding_mode="floor")
    counts = torch.bincount(chosen.int() + 1, minlength=start.shape[0] + 1).tolist()
    begin = counts[0]  # empty slots of Routes
    for count, k0 in zip(counts[1:], start.tolist(), strict=True):
        for r0 in range(begin, begin + count, most):
            yield rows[r0 : min(r0 + most, begin + count)], k0
        begin += count


def _even(rows: Tensor) -> tuple[Tensor, int, int]:
    """Rows to split evenly over the threads, how many parts, and how many rows were repeated at the end to fit.

    The kernel shares whole tiles of queries among threads, which leaves one waiting for the other; equal parts as
    separate batch entries do not.
    """
    parts = max(1, min(torch.get_num_threads(), rows.shape[0] // _ROWS_PER_THREAD))
    extra = -rows.shape[0] % parts
    return (torch.cat([rows, rows[-1:].expand(extra)]) if extra else rows), parts, extra


def _merge_rows(out: Tensor, lse: Tensor, rows: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Folds a partial softmax over more keys into rows of ``out``: weights are a sigmoid of the log-sum-exps' gap."""
    old_lse = lse.index_select(0, rows)
    old = out.index_select(0, rows)
    old.lerp_(part.to(out.dtype), (part_lse - old_lse).sigmoid_()[:, None])
    out.index_copy_(0, rows, old)
    lse.index_copy_(0, rows, torch.logaddexp(old_lse, part_lse))
