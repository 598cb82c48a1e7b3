"""The gate: which earlier blocks each query reads."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mobazoo.attention.blocks import UNUSED, Centroids
from mobazoo.attention.gates import TORCH, TRITON, check_by
from mobazoo.attention.heap import keep_heap
from mobazoo.attention.lanes import LEAST_QUERIES, Piece, share, spread
from mobazoo.attention.native import gate, library
from mobazoo.attention.pattern import MoBA
from mobazoo.attention.segments import Segments, first_slot
from mobazoo.attention.selection import RUN, choose
from mobazoo.errors import InputError

EMPTY = -1

# Entries of ``Routes.index`` that are filled at once, for each head.
_RECENT = 8 << 20

# Bytes of one query's float32 copy, by head dim.
_BYTES_PER_QUERY_DIM = 8


class _Room(NamedTuple):
    """Working memory of a chunk: on a CPU its scores should live in cache, on a GPU it should fill the machine.

    A score costs its float32 and, with a quarter of the others, what its choice needs (40 bytes where all take part in
    it). All is far below the 1 GiB that ``route`` promises.
    """

    bytes: int
    bytes_per_score: int

    @classmethod
    def of(cls, device: torch.device) -> _Room:
        """The room there is on a device, on a CPU for the calling thread's share of cores."""
        if device.type != "cpu":
            return cls(256 << 20, 16)
        return cls(min(torch.get_num_threads(), 32) << 23, 16)


@dataclass(frozen=True)
class Routes:
    """Which earlier blocks each query reads. The own block is implied: it starts at ``slot - pos % block_size``.

    Entries of one query are distinct blocks of its document that end before its own block begins. ``Routes`` made by
    hand are taken at their word, except for shapes, dtypes and a ``start`` beyond the row.

    Attributes:
        index: ``[B, Hq, T, top_k - 1]`` int32 (int16 where it fits), ``-1`` is an empty slot. ``route`` puts the best
            score first; a query that reads every block it may has the most recent first.
        start: ``[B, N]`` int32; block ``n`` is the slots ``start[n] .. start[n] + block_size - 1``. Ascending, and -1
            at the end where a row has fewer blocks.
        block_size: tokens in a block.
    """

    index: Tensor
    start: Tensor
    block_size: int


def query_slots(segments: Segments, length: int, q_start: int | Tensor | None) -> Tensor:
    """``[T]`` int64, the row slots of ``length`` queries that begin at ``q_start`` (None: the last ones)."""
    first = segments.length - length if q_start is None else q_start
    return torch.arange(length, device=segments.doc.device) + first


def route(
    q: Tensor, centroids: Centroids, pattern: MoBA, segments: Segments, q_start: int | Tensor | None = None
) -> Routes:
    """Chooses the ``top_k - 1`` best complete blocks before each query's own (arXiv 2502.13189, equations 5 to 7).

    The score of a block is the unscaled dot product of query and centroid in float32; among equal scores the most
    recent block wins. No gradient flows through the choice, nothing waits for a GPU, and working memory beyond
    inputs and result stays below 1 GiB for any shape.

    Args:
        q: ``[B, Hq, T, D]``, after RoPE.
        centroids: of the ``S`` slots' keys, ``Hq`` divisible by their ``Hkv``.
        pattern: block size and top_k.
        segments: the documents of the ``S`` slots.
        q_start: slot of the first query, an int or a 0-dim device tensor (None: queries are the last ``T`` slots).

    Raises:
        InputError: shapes that do not fit together.
    """
    return route_by(TORCH, q, centroids, pattern, segments, q_start)


def route_by(
    by: str,
    q: Tensor,
    centroids: Centroids,
    pattern: MoBA,
    segments: Segments,
    q_start: int | Tensor | None = None,
) -> Routes:
    """``route`` by ``torch``, or by ``triton`` with our kernel; both choose the same but for near-ties.

    Raises:
        InputError: as ``route``, or an unknown ``by``.
        UnsupportedError: ``triton`` where the kernel does not run, or more than 128 routed blocks a query.
    """
    if q.dim() != 4 or centroids.mean.dim() != 4 or q.shape[1] % centroids.mean.shape[1]:
        raise InputError(
            "route: q must be [B, Hq, T, D] with Hq divisible by the centroids' Hkv, "
            f"got q {list(q.shape)} and centroids {list(centroids.mean.shape)}"
        )
    batch, _, blocks, dim = centroids.mean.shape
    if (q.shape[0], q.shape[3]) != (batch, dim) or segments.batch != batch or centroids.start.shape != (batch, blocks):
        raise InputError(
            "route: rows, blocks and head dim must agree, "
            f"got q {list(q.shape)}, centroids {list(centroids.mean.shape)} with start {list(centroids.start.shape)}, "
            f"and segments of {segments.batch} rows"
        )
    if blocks != segments.length // pattern.block_size:
        raise InputError(
            f"route: centroids hold {blocks} blocks, want S // block_size = "
            f"{segments.length} // {pattern.block_size}; make them with the pattern's block size"
        )
    q_start = first_slot("route", q.shape[2], segments.length, q_start)
    check_by("route", by, q.device, q.dtype, q.shape[3], pattern.top_k - 1)
    slot = query_slots(segments, q.shape[2], q_start)
    if segments.whole:  # blocks lie end to end
        stop = (slot // pattern.block_size).int().expand(segments.batch, -1)
        first = stop.new_zeros(1, 1).expand_as(stop)
    else:
        first, stop = _candidates(slot, centroids.start, pattern.block_size, segments)
    index = torch.ops.mobazoo.gate(q.detach(), centroids.mean.detach(), first, stop, pattern.top_k - 1, by)
    return Routes(index, centroids.start, pattern.block_size)


def _candidates(slot: Tensor, start: Tensor, block_size: int, segments: Segments) -> tuple[Tensor, Tensor]:
    """The complete blocks of a query's document before its own, ``first .. stop - 1``, each ``[B, T]`` int32."""
    # Blocks stand in slot order, so a query's candidates are one range: from its document's first to its own block.
    in_order = torch.where(start == UNUSED, segments.length, start).contiguous()
    pos, slot32 = segments.pos[:, slot], slot.int()
    stop = torch.searchsorted(in_order, slot32 - pos % block_size, out_int32=True)
    first = torch.searchsorted(in_order, slot32 - pos, out_int32=True)
    return torch.where(segments.doc[:, slot] >= 0, first, stop), stop


def _index_dtype(n: int) -> torch.dtype:
    return torch.int16 if n <= torch.iinfo(torch.int16).max else torch.int32


# An opaque operator: inlined, its data-dependent chunking breaks a fullgraph compile.
@torch.library.custom_op("mobazoo::gate", mutates_args=())
def _gate(q: Tensor, mean: Tensor, first: Tensor, stop: Tensor, k: int, by: str = TORCH) -> Tensor:
    """Best ``k`` of the blocks ``first .. stop - 1`` of each query: ``[B, Hq, T, k]``, -1 where there are fewer.

    On a CPU by compiled code where there is any. ``first`` and ``stop`` are ``[B, T]`` and do not decrease along a row.
    """
    batch, hq, length, _ = q.shape
    hkv, n = mean.shape[1], mean.shape[2]
    if by == TRITON and batch * hq * length * n * k:
        index = torch.empty(batch, hq, length, k, dtype=_index_dtype(n), device=q.device)
        import_module("mobazoo.attention.kernels.triton_route").choose(q, mean, first, stop, index)
        return index
    if q.device.type == "cpu" and library() is not None:
        index = torch.empty(batch, hq, length, k, dtype=_index_dtype(n))
        gate.choose(q, mean, first, stop, index)
        return index
    index = torch.full((batch, hq, length, k), EMPTY, dtype=_index_dtype(n), device=q.device)
    if k == 0 or n == 0:
        return index
    # Whoever may read k blocks or fewer reads them all, the most recent first; only the others choose.
    before = torch.arange(1, k + 1, device=q.device, dtype=torch.int32)
    step = max(1, _RECENT // (batch * k))
    for tokens in (slice(t, t + step) for t in range(0, length, step)):
        recent = stop[:, tokens, None] - before  # [B, t, k]
        index[:, :, tokens] = torch.where(recent >= first[:, tokens, None], recent, EMPTY)[:, None]
    group = hq // hkv

    def work(piece: Piece) -> None:
        row, heads, tokens = piece.row, piece.heads, piece.tokens
        at = (row, piece.queries(group), tokens)
        of_group = [x[at].unflatten(0, (-1, group)) for x in (q, index)]
        _choose(of_group[0], mean[row, heads], first[row, tokens], stop[row, tokens], of_group[1])

    if q.device.type == "cpu":
        keep_heap()
        spread(work, share(batch, hkv, length, LEAST_QUERIES // group, most=length))
    else:
        for row in range(batch):
            work(Piece(row, slice(0, hkv), slice(0, length), 0))
    return index


@_gate.register_fake
def _(q: Tensor, mean: Tensor, first: Tensor, stop: Tensor, k: int, by: str = TORCH) -> Tensor:
    return q.new_empty((*q.shape[:3], k), dtype=_index_dtype(mean.shape[2]))


def _choose(q: Tensor, mean: Tensor, first: Tensor, stop: Tensor, index: Tensor) -> None:
    """Writes the best blocks of queries that have a choice into ``index`` [h, G, t, k], where the recent ones stand.

    ``q`` is ``[h, G, t, D]``, ``mean`` ``[h, N, D]``, ``first`` and ``stop`` ``[t]``.
    """
    hkv, group, _, dim = q.shape
    n, k = mean.shape[1], index.shape[3]
    chooses, room = stop - first > k, _Room.of(q.device)
    # Key heads together where one query's scores and the centroids' float32 copy are small, else a few at a time.
    heads = max(1, min(hkv, room.bytes // (n * (room.bytes_per_score * group + 4 * dim))))
    for j in range(0, hkv, heads):
        some = slice(j, j + heads)
        centroid = pad(mean[some].float(), (0, 0, 0, RUN))  # [h, N + RUN, D], since whole runs of blocks are scored
        for t0, t1, n0, n1 in _chunks(first, stop, chooses, q[some].shape, n, room):
            chunk = q[some, :, t0:t1].float().flatten(1, 2)  # [h, G * t, D]
            scores = torch.bmm(centroid[:, n0 : n0 + -(-(n1 - n0) // RUN) * RUN], chunk.mT)  # [h, n, G * t]
            place = index[some, :, t0:t1, : min(k, n1 - n0)]
            choose(scores.unflatten(2, (group, -1)), first[t0:t1] - n0, stop[t0:t1] - n0, n0, place)


def _chunks(
    first: Tensor, stop: Tensor, chooses: Tensor, queries: torch.Size, n: int, room: _Room
) -> list[tuple[int, int, int, int]]:
    """Query ranges and the block range each needs, ``(t0, t1, n0, n1)``, each within ``room`` if it can be.

    On a CPU the ranges are read (free there), so that blocks nobody may choose and queries that have no choice are
    never scored. Elsewhere reading them would wait for the device: every chunk scores all blocks.
    """
    heads, group, length, dim = queries
    budget = room.bytes // (heads * group)

    def cost(tokens: int, blocks: int) -> int:
        return tokens * (room.bytes_per_score * blocks + _BYTES_PER_QUERY_DIM * dim)

    def fits(t0: int, t1: int) -> bool:
        return cost(t1 - t0, int(stop[t1 - 1]) - int(first[t0])) <= budget

    if first.device.type != "cpu":
        step = max(1, budget // cost(1, n))
        return [(t, min(t + step, length), 0, n) for t in range(0, length, step)]
    edge = pad(chooses, (1, 1))
    chunks = []
    for t0, end in (edge[1:] != edge[:-1]).nonzero().view(-1, 2).tolist():
        while t0 < end:
            t1, too_far = (end, end + 1) if fits(t0, end) else (t0 + 1, end)
            while t1 + 1 < too_far:
                middle = (t1 + too_far) // 2
                t1, too_far = (middle, too_far) if fits(t0, middle) else (t1, middle)
            chunks.append((t0, t1, int(first[t0]), int(stop[t1 - 1])))
            t0 = t1
    return chunks
