"""Who reads which block, on a CPU: the rows of ``Routes`` sorted by block, and runs of them that make good calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mobazoo.attention.kernels.cpu_own import TOKENS_PER_CALL

# Entries sorted at once: from 32768 on torch sorts integers by radix.
_SORTED_TOGETHER = 1 << 18
# Rows of one batch entry: the backward kernel's tiles are large from 768 on.
_ROWS_PER_ENTRY = 768
# Below this many rows a thread, splitting a call over the threads costs more than it gives.
ROWS_PER_THREAD = 128

Run = tuple[int, int, int]  # first of a block's rows, how many, and the block's first slot


@dataclass(frozen=True, slots=True)
class Reads:
    """The readers of one key head's blocks.

    Attributes:
        rows: int64, the rows ``g * T + t`` of the group's queries, ordered by block and ascending inside one. Another
            row for each thread follows, so that a run may be read that far past its end.
        blocks: the run of each block that is read.
    """

    rows: Tensor
    blocks: list[Run]

    @classmethod
    def none(cls) -> Reads:
        """No block is read."""
        return cls(torch.empty(0, dtype=torch.int64), [])

    def runs(self, most: int) -> Iterator[Run]:
        """The runs in order of blocks, none longer than ``most``."""
        for begin, count, k0 in self.blocks:
            for done in range(0, count, most):
                yield begin + done, min(most, count - done), k0


def reads_by_block(index: Tensor, start: Tensor, late: Tensor | None) -> Iterator[Reads]:
    """The readers of every key head's blocks, in order of key heads.

    Args:
        index: ``[Hkv, G, T, K - 1]`` of ``Routes``.
        start: ``[N]``.
        late: int64, the queries whose entries count, ascending (None: all).
    """
    hkv, group, length, k = index.shape
    queries = torch.arange(group)[:, None] * length + (torch.arange(length) if late is None else late)
    queries = queries.flatten()
    entries, bins, k0s = queries.shape[0] * k, start.shape[0] + 1, start.tolist()
    if not entries:
        yield from [Reads.none()] * hkv
        return
    together = max(1, _SORTED_TOGETHER // entries)
    for some in index.split(together):
        keys = (some if late is None else some[:, :, late]).flatten(1).int() + 1  # [h, n * (K - 1)], 0 is empty
        heads = keys.shape[0]
        keys += (torch.arange(heads, dtype=torch.int32) * bins)[:, None]
        ordered, order = keys.flatten().sort(stable=True)  # integers: a radix sort
        order.view(heads, entries).sub_(torch.arange(0, heads * entries, entries)[:, None])
        rows = torch.zeros(heads * entries + torch.get_num_threads(), dtype=torch.int64)
        torch.div(order, k, rounding_mode="floor", out=rows[: heads * entries])
        if late is not None:
            rows = queries.index_select(0, rows)
        for head, counts in enumerate(torch.bincount(ordered, minlength=heads * bins).view(heads, bins).tolist()):
            begin, blocks = counts[0], []
            for count, k0 in zip(counts[1:], k0s, strict=True):
                if count:
                    blocks.append((begin, count, k0))
                begin += count
            yield Reads(rows[head * entries :], blocks)


def reads_all_before(index: Tensor, doc: Tensor, pos: Tensor, block_size: int) -> Tensor | None:
    """``[T]`` bool, the queries so early in their document that top_k reads every block before theirs, if all do.

    Together such queries are plain causal attention over the document's beginning, which needs no gather. ``index``
    is ``[Hq, T, K - 1]`` of routes that somebody may have chosen by hand: None if they read less.
    """
    early = (pos < (index.shape[-1] + 1) * block_size) & (doc >= 0)
    slots = early.nonzero().flatten()
    earlier = pos[slots] // block_size
    heads = max(1, _SORTED_TOGETHER // max(1, slots.shape[0] * index.shape[-1]))
    if all(bool(((some[:, slots] >= 0).sum(-1) == earlier).all()) for some in index.split(heads)):
        return early
    return None


def alike(reads: Reads, threads: int, block_size: int) -> Iterator[list[Run]]:
    """Runs to put into one call as equal batch entries: about as long, and as many as the threads share evenly.

    The backward kernel gives a thread whole entries. A run that is like no other is shared among the threads.
    """
    pieces: list[Run] = []
    for begin, count, k0 in reads.blocks:
        pieces += _shares(begin, count, k0, max(1, count // _ROWS_PER_ENTRY))
    pieces.sort(key=lambda piece: -piece[1])
    at = 0
    while at < len(pieces):
        longest = pieces[at][1]
        room = max(threads, min(TOKENS_PER_CALL // max(longest, block_size), len(pieces)))
        near = [piece for piece in pieces[at : at + room] if longest - piece[1] <= max(32, longest // 8)]
        if len(near) >= threads:
            near = near[: len(near) // threads * threads]
            yield near
            at += len(near)
        else:
            yield list(_shares(*pieces[at], max(1, min(threads, longest // ROWS_PER_THREAD))))
            at += 1


def _shares(begin: int, count: int, k0: int, parts: int) -> Iterator[Run]:
    bounds = [begin + count * i // parts for i in range(parts + 1)]
    yield from ((lo, hi - lo, k0) for lo, hi in pairwise(bounds))


@dataclass(frozen=True, slots=True)
class Call:
    """Runs as equal batch entries of one kernel call.

    Attributes:
        rows: int64, the rows of all entries; a run shorter than the ``longest`` is filled with its first row.
        slots: int64, the slots of all entries' blocks.
        longest: rows of an entry.
    """

    rows: Tensor
    slots: Tensor
    longest: int
    count: int

    @classmethod
    def of(cls, runs: list[Run], rows: Tensor, block_size: int) -> Call:
        """The call for ``runs``, whose rows are in ``rows``."""
        longest = max(count for _, count, _ in runs)
        # Not with whatever row comes next: that may be padding, whose log-sum-exp is not finite.
        all_rows = [
            part
            for begin, count, _ in runs
            for part in (rows[begin : begin + count], rows[begin].expand(longest - count))
        ]
        firsts = torch.tensor([k0 for _, _, k0 in runs])
        return cls(torch.cat(all_rows), (firsts[:, None] + torch.arange(block_size)).flatten(), longest, len(runs))

    def entries(self, x: Tensor) -> Tensor:
        """The rows of ``x [G * T, D]`` as ``[entries, 1, longest, D]``."""
        return x.index_select(0, self.rows).view(self.count, 1, self.longest, -1)

    def blocks(self, x: Tensor) -> Tensor:
        """The blocks of ``x [S, D]`` as ``[entries, 1, block_size, D]``."""
        return x.index_select(0, self.slots).view(self.count, 1, -1, x.shape[1])
