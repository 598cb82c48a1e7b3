"""The flash schedule on a CPU: one key head at a time, each partial result merged in place while it is in cache.

For a row and a key head, every query first reads its own block (its document, for full attention) causally. Then,
block by block, the queries of the whole group that chose the block are gathered, attend to it in one kernel call,
and are folded into the running output. The backward walks the same work with the merged output and log-sum-exp, so
that no gradient of a log-sum-exp is ever needed. Working memory beyond the result: float32 copies of one key head's
queries, output and gradients, plus ``TOKENS_PER_CALL`` rows a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mobazoo.attention.heap import keep_heap
from mobazoo.attention.kernels.cpu_own import (
    TOKENS_PER_CALL,
    Tile,
    backward_kernel,
    forward_kernel,
    own_backward,
    own_forward,
    own_tiles,
)
from mobazoo.attention.kernels.cpu_reads import (
    ROWS_PER_THREAD,
    Call,
    Reads,
    Run,
    alike,
    reads_all_before,
    reads_by_block,
)


class Heads(NamedTuple):
    """One row's work for one key head and the query heads of its group."""

    row: int
    key: int
    queries: slice
    tiles: list[Tile]
    reads: Reads


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
    for b, j, g, tiles, reads in _work(q, k, index, start, doc, pos, q_start, block_size):
        queries, keys, values = q[b, g].contiguous(), k[b, j], v[b, j]
        # float32 results are merged where they belong, narrower ones in a wide copy that is rounded once
        merged = out[b, g] if q.dtype == wide else queries.new_empty(queries.shape, dtype=wide)
        merged.index_fill_(1, (doc[b, q_start : q_start + length] < 0).nonzero().flatten(), 0.0)
        for tile in tiles:
            own_forward(tile, q_start, queries, keys, values, merged, lse[b, g], scale)
        flat = (queries.flatten(0, 1), merged.flatten(0, 1), lse[b, g].flatten())
        _routed_forward(reads, *flat, keys, values, block_size, scale)
        if merged.dtype != out.dtype:
            out[b, g] = merged
    return out, lse


def _routed_forward(
    reads: Reads, q: Tensor, out: Tensor, lse: Tensor, keys: Tensor, values: Tensor, block_size: int, scale: float
) -> None:
    """Merges each block's partial results into ``out [G * T, D]`` and ``lse [G * T]`` while they are in cache."""
    dim = q.shape[1]
    for begin, count, k0 in reads.runs(TOKENS_PER_CALL):
        # The kernel shares whole tiles of queries among threads, which leaves one waiting for the other; equal
        # parts as separate batch entries do not. A few rows of the next block may fill the last part.
        parts = max(1, min(torch.get_num_threads(), count // ROWS_PER_THREAD))
        rows = reads.rows[begin : begin + count]
        part, part_lse = forward_kernel(
            q.index_select(0, reads.rows[begin : begin + count + -count % parts]).view(parts, 1, -1, dim),
            keys[k0 : k0 + block_size].expand(parts, 1, -1, -1),
            values[k0 : k0 + block_size].expand(parts, 1, -1, -1),
            0.0,
            False,
            scale=scale,
        )
        part, part_lse = part.view(-1, dim)[:count], part_lse.flatten()[:count]
        # Two partial softmaxes: the weight of the second is a sigmoid of the gap of their log-sum-exps.
        old, old_lse = out.index_select(0, rows), lse.index_select(0, rows)
        old.lerp_(part.to(out.dtype), (part_lse - old_lse).sigmoid_()[:, None])
        out.index_copy_(0, rows, old)
        lse.index_copy_(0, rows, torch.logaddexp(old_lse, part_lse))


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
    wide = torch.promote_types(q.dtype, torch.float32)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for b, j, g, tiles, reads in _work(q, k, index, start, doc, pos, q_start, block_size):
        rowwise = [x[b, g].contiguous() for x in (dout, q, out)]
        keys, values, stats = k[b, j], v[b, j], lse[b, g]
        places = (grads[0][b, g], grads[1][b, j], grads[2][b, j])
        sums = [x.zero_() if x.dtype == wide else x.new_zeros(x.shape, dtype=wide) for x in places]
        # On short pieces the kernel is slower in a narrow dtype than in float32, and its sums would be rounded.
        wide_rows, wide_keys, wide_values = [x.to(wide) for x in rowwise], keys.to(wide), values.to(wide)
        for tile in tiles:
            own_backward(tile, q_start, wide_rows, wide_keys, wide_values, stats, sums, scale)
        del wide_rows, wide_keys, wide_values
        flat = [x.flatten(0, 1) for x in (*rowwise, stats[..., None])]
        for runs in alike(reads, torch.get_num_threads(), block_size):
            _routed_backward(runs, reads.rows, flat, keys, values, sums, block_size, scale)
        for place, total in zip(places, sums, strict=True):
            if place.dtype != wide:
                place.copy_(total)
    return grads[0], grads[1], grads[2]


def _routed_backward(
    runs: list[Run],
    all_rows: Tensor,
    flat: list[Tensor],
    keys: Tensor,
    values: Tensor,
    sums: list[Tensor],
    block_size: int,
    scale: float,
) -> None:
    """Adds the gradients of some runs of readers in one call: batch entries, filled to the longest."""
    dim, call = keys.shape[-1], Call.of(runs, all_rows, block_size)
    dout, q, out, lse = (call.entries(x) for x in flat)
    for part, (_, count, _) in enumerate(runs):
        if count < call.longest:
            dout[part, :, count:] = 0  # what fills the entry must not count
    part_dq, part_dk, part_dv = backward_kernel(
        dout, q, call.blocks(keys), call.blocks(values), out, lse[..., 0], 0.0, False, scale=scale
    )
    dq, dk, dv = sums
    dq.flatten(0, 1).index_add_(0, call.rows, part_dq.view(-1, dim).to(dq.dtype))
    for total, part_grad in ((dk, part_dk), (dv, part_dv)):
        total.index_add_(0, call.slots, part_grad.view(-1, dim).to(total.dtype))


def _work(
    q: Tensor,
    k: Tensor,
    index: Tensor | None,
    start: Tensor | None,
    doc: Tensor,
    pos: Tensor,
    q_start: int,
    block_size: int,
) -> Iterator[Heads]:
    """What each key head of each row has to do."""
    length, hkv = q.shape[2], k.shape[1]
    group, here = q.shape[1] // hkv, slice(q_start, q_start + length)
    for b in range(q.shape[0]):
        if index is None or start is None:
            tiles = own_tiles(doc[b], pos[b], None, 0, here.start, here.stop)
            reads = iter([Reads.none()] * hkv)
        else:
            # Causal attention over one long piece is shared among threads by heads: too few, and blocks are better.
            early = None
            if group >= torch.get_num_threads():
                early = reads_all_before(index[b], doc[b, here], pos[b, here], block_size)
            dense = 0 if early is None else (index.shape[-1] + 1) * block_size
            tiles = own_tiles(doc[b], pos[b], block_size, dense, here.start, here.stop)
            late = None if early is None or not early.any() else (~early).nonzero().flatten()
            reads = reads_by_block(index[b].unflatten(0, (hkv, group)), start[b], late)
        for j, read in enumerate(reads):
            yield Heads(b, j, slice(j * group, (j + 1) * group), tiles, read)
