"""The flash schedule on a CPU by torch's operators: each thread takes whole key heads.

For a row and a key head, every query first reads its own block (its document, for full attention) causally. Then,
block by block, the queries of the whole group that chose the block are gathered, attend to it in one kernel call, and
are folded into the running output while that is in cache. The backward walks the same work with the merged output and
log-sum-exp, so that no gradient of a log-sum-exp is ever needed. Working memory beyond the result: for each thread,
float32 copies of one key head's queries, output, keys, values and gradients (of as many as have ``TOKENS_PER_CALL``
tokens together, where they are short), plus ``TOKENS_PER_CALL`` rows of each query head a call.
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
    documents,
    forward_kernel,
    own_backward,
    own_forward,
    own_tiles,
)
from mobazoo.attention.kernels.cpu_reads import Reads, reads_all_before, reads_by_block
from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.lanes import LEAST_QUERIES, Piece, Shares, share, spread

# Below this many rows a thread, splitting a call over the threads costs more than it gives.
_ROWS_PER_THREAD = 128
# Queries for one thread of ours, at least. The backward kernel shares whole entries only, and has one a call.
_FORWARD_LEAST = LEAST_QUERIES
_BACKWARD_LEAST = 1024
# Pieces that share a key head, each with sums of its own for its gradients.
_MOST_SUMS = 4


class Plan(NamedTuple):
    """A row's work, the same for every key head but for who reads which block."""

    tiles: list[Tile]
    reads: Iterator[Reads]  # of one key head after the other


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, T, D]`` and log-sum-exp ``[B, Hq, T]``, at least float32; padding gets zeros and -inf."""
    keep_heap()
    group = q.shape[1] // k.shape[1]
    out = q.new_empty(q.shape)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))

    def work(piece: Piece) -> None:
        row, heads, queries, tokens = piece.row, piece.heads, piece.queries(group), piece.tokens
        at = (row, queries, tokens)
        _forward(q[at], k[row, heads], v[row, heads], out[at], lse[at], layout.cut(piece, group), scale)

    spread(work, _shares(q, k, layout, _FORWARD_LEAST, most=q.shape[2]))
    return out, lse


def _forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float) -> None:
    """A piece: ``q`` and ``out`` ``[hq, t, D]``, ``k`` and ``v`` ``[h, S, D]``, ``lse`` ``[hq, t]``."""
    first, group = _first(layout), len(q) // len(k)
    plan = _plan(q, k, layout)
    together = max(1, TOKENS_PER_CALL // k.shape[1])  # key heads in one call, where each is short
    for some in range(0, len(k), together):
        # In float32 whatever the dtype: kernels are no faster in a narrow one, and partial results are rounded once.
        keys, values = (x[some : some + together].to(lse.dtype) for x in (k, v))
        g = slice(some * group, (some + len(keys)) * group)
        queries, stats = q[g].to(lse.dtype).contiguous(), lse[g].contiguous()
        in_place = out.dtype == lse.dtype and out[g].is_contiguous()
        merged = out[g] if in_place else torch.empty_like(queries)
        if not layout.whole:
            merged.masked_fill_(layout.doc[0, first : first + q.shape[1], None] < 0, 0.0)
        of_group = [x.unflatten(0, (-1, group)) for x in (queries, merged, stats)]
        for tile in plan.tiles:
            own_forward(tile, first, of_group, keys, values, scale)
        for j in range(len(keys)):
            flat = [x[j].flatten(0, 1) for x in of_group]
            reads = next(plan.reads)
            for begin, count, k0 in reads.runs(TOKENS_PER_CALL):
                block = slice(k0, k0 + layout.block_size)
                _routed_forward(reads.rows[begin : begin + count], flat, keys[j, block], values[j, block], scale)
        if not in_place:
            out[g] = merged
        lse[g] = stats


def _routed_forward(rows: Tensor, flat: list[Tensor], k: Tensor, v: Tensor, scale: float) -> None:
    """Merges what ``rows`` read of one block into the output while it is in cache.

    ``flat`` is q and output ``[R, D]`` and log-sum-exp ``[R]``, ``k`` and ``v`` are ``[block_size, D]``.
    """
    q, out, lse = flat
    # The kernel shares whole tiles of queries among threads, which leaves one waiting for the other; equal parts as
    # separate batch entries do not.
    count = rows.shape[0]
    parts = max(1, min(torch.get_num_threads(), count // _ROWS_PER_THREAD))
    most = -(-count // parts)
    queries = q.new_zeros(parts * most, q.shape[1])
    torch.index_select(q, 0, rows, out=queries[:count])
    keys, values = (x.expand(parts, 1, -1, -1) for x in (k, v))
    part, part_lse = forward_kernel(queries.view(parts, 1, most, -1), keys, values, 0.0, False, scale=scale)
    part, part_lse = part.view(-1, q.shape[1])[:count], part_lse.flatten()[:count]
    # The weight of the second softmax is a sigmoid of the gap of their log-sum-exps.
    old, old_lse = out.index_select(0, rows), lse.index_select(0, rows)
    old.lerp_(part, (part_lse - old_lse).sigmoid_()[:, None])
    out.index_copy_(0, rows, old)
    lse.index_copy_(0, rows, torch.logaddexp(old_lse, part_lse))


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``, accumulated in float32 and rounded once."""
    keep_heap()
    group = q.shape[1] // k.shape[1]
    over = _shares(q, k, layout, _BACKWARD_LEAST, _MOST_SUMS)
    # Pieces of one key head, each with sums of its own.
    shared = 1 + max((piece.part for piece in over.pieces), default=0)
    dq = q.new_empty(q.shape)
    dtype = k.dtype if shared == 1 else lse.dtype
    dk, dv = (x.new_empty(shared, *x.shape, dtype=dtype) for x in (k, v))

    def work(piece: Piece) -> None:
        row, heads = piece.row, piece.heads
        at, part = (row, piece.queries(group), piece.tokens), (piece.part, row, heads)
        rowwise, places = [x[at] for x in (dout, q, out, lse)], (dq[at], dk[part], dv[part])
        _backward(rowwise, k[row, heads], v[row, heads], places, layout.cut(piece, group), scale)

    spread(work, over)
    dk, dv = (x[0] if shared == 1 else x.sum(0).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv


def _backward(
    given: list[Tensor],
    k: Tensor,
    v: Tensor,
    places: tuple[Tensor, ...],
    layout: Layout,
    scale: float,
) -> None:
    """A piece, as in ``_forward``; ``given`` is dout, q, out and lse, ``places`` take the gradients of q, k and v."""
    dout, q, out, lse = given
    wide, first = lse.dtype, _first(layout)
    group, plan = len(q) // len(k), _plan(q, k, layout)
    for j, reads in enumerate(plan.reads):
        g = slice(j * group, (j + 1) * group)
        rowwise = [x[g].contiguous() for x in (dout, q, out)]
        keys, values, stats = k[j], v[j], lse[g].contiguous()
        here = (places[0][g], places[1][j], places[2][j])
        in_place = [x.dtype == wide and x.is_contiguous() for x in here]
        sums = [x.zero_() if same else x.new_zeros(x.shape, dtype=wide) for x, same in zip(here, in_place, strict=True)]
        wide_keys, wide_values = keys.to(wide), values.to(wide)
        for tile in plan.tiles:
            own_backward(tile, first, rowwise, wide_keys, wide_values, stats, sums, scale)
        flat = [x.flatten(0, 1) for x in (*rowwise, stats[..., None])]
        dq, dk, dv = (sums[0].flatten(0, 1), *sums[1:])
        for begin, count, k0 in reads.runs(TOKENS_PER_CALL):
            rows, block = reads.rows[begin : begin + count], slice(k0, k0 + layout.block_size)
            _routed_backward(rows, flat, keys[block], values[block], (dq, dk[block], dv[block]), scale)
        for place, total, same in zip(here, sums, in_place, strict=True):
            if not same:
                place.copy_(total)


def _routed_backward(
    rows: Tensor, flat: list[Tensor], k: Tensor, v: Tensor, sums: tuple[Tensor, ...], scale: float
) -> None:
    """Adds the gradients of what ``rows`` read of one block; ``flat`` is dout, q and out ``[R, D]``, lse ``[R, 1]``."""
    dout, q, out, lse = (x.index_select(0, rows)[None, None] for x in flat)
    parts = backward_kernel(dout, q, k[None, None], v[None, None], out, lse[..., 0], 0.0, False, scale=scale)
    dq, dk, dv = (part[0, 0] for part in parts)
    sums[0].index_add_(0, rows, dq.to(sums[0].dtype))
    sums[1].add_(dk)
    sums[2].add_(dv)


def _shares(q: Tensor, k: Tensor, layout: Layout, least: int, most: int) -> Shares:
    batch, hq, tokens, _ = q.shape
    heads = k.shape[1]
    if layout.index is None:  # one long causal call a row, which the kernel itself shares among threads
        return Shares([Piece(row, slice(0, heads), slice(0, tokens), 0) for row in range(batch)], 1)
    return share(batch, heads, tokens, least // (hq // heads), most)


def _first(layout: Layout) -> int:
    return int(layout.q_start)  # on a CPU a tensor may be read


def _plan(q: Tensor, k: Tensor, layout: Layout) -> Plan:
    """What a piece has to do."""
    first, length, hkv = _first(layout), q.shape[1], k.shape[0]
    stop, over = first + length, documents(layout.doc[0], layout.whole)
    if layout.index is None or layout.start is None:
        return Plan(own_tiles(over, None, 0, first, stop), iter([Reads.none()] * hkv))
    index, begins, block_size = layout.index[0], layout.start[0], layout.block_size
    pos, doc = layout.pos[0, first:stop], None if layout.whole else layout.doc[0, first:stop]
    top_k = index.shape[-1] + 1
    early = top_k * block_size if reads_all_before(index, pos, doc, block_size) else 0
    late = (pos >= early).nonzero().flatten()
    return Plan(
        own_tiles(over, block_size, early, first, stop),
        reads_by_block(index.unflatten(0, (hkv, -1)), begins, None if len(late) == length else late),
    )
