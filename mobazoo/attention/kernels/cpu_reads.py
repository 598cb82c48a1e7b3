"""Who reads which block, on a CPU: the rows of ``Routes`` sorted by block, and runs of them that make good calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Entries sorted at once, and the number from which torch sorts integers by radix: so much faster that fewer are filled
# up to it.
_SORTED_TOGETHER = 1 << 18
_LEAST_SORTED = 1 << 15

Run = tuple[int, int, int]  # first of a block's rows, how many, and the block's first slot


@dataclass(frozen=True, slots=True)
class Reads:
    """The readers of one key head's blocks.

    Attributes:
        rows: int64, the rows ``g * T + t`` of the group's queries, ordered by block and ascending inside one.
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


class Call(NamedTuple):
    """Readers of one block in one key head, or in two that share a kernel call."""

    rows: list[Tensor]  # of each key head, the longer one first; those of the second come after all of the first
    heads: list[int]  # their numbers, 0 and 1
    k0: int


def calls(heads: list[Reads], rows_of_head: int, most: int) -> Iterator[Call]:
    """The calls for one key head or two, for at most ``most`` rows of each; a head has ``rows_of_head`` rows.

    Two share a call where one has at least half as many readers as the other: a call takes as long as its longer part.
    """
    readers: dict[int, list[tuple[Tensor, int]]] = {}
    for number, reads in enumerate(heads):
        rows = reads.rows + rows_of_head if number else reads.rows
        for begin, count, k0 in reads.blocks:
            readers.setdefault(k0, []).append((rows[begin : begin + count], number))
    for k0, of_block in readers.items():
        of_block.sort(key=lambda each: -len(each[0]))
        for done in range(0, len(of_block[0][0]), most):
            some = [(rows[done : done + most], number) for rows, number in of_block if len(rows) > done]
            shared = len(some) > 1 and 2 * len(some[1][0]) >= len(some[0][0])
            for part in [some] if shared else [[each] for each in some]:
                yield Call([rows for rows, _ in part], [number for _, number in part], k0)


def reads_by_block(index: Tensor, start: Tensor, late: Tensor | None) -> Iterator[Reads]:
    """The readers of every key head's blocks, in order of key heads.

    Args:
        index: ``[Hkv, G, T, K - 1]`` of ``Routes``.
        start: ``[N]``.
        late: int64, the queries whose entries count, ascending (None: all).
    """
    hkv, group, length, k = index.shape
    if not k or (late is not None and not len(late)):
        yield from [Reads.none()] * hkv
        return
    queries = torch.arange(group)[:, None] * length + (torch.arange(length) if late is None else late)
    queries = queries.flatten()
    entries, bins, k0s = queries.shape[0] * k, start.shape[0] + 1, start.tolist()
    together = max(1, _SORTED_TOGETHER // entries)
    for some in index.split(together):
        keys = (some if late is None else some[:, :, late]).flatten(1).int() + 1  # [h, n * (K - 1)], 0 is empty
        heads = keys.shape[0]
        keys += (torch.arange(heads, dtype=torch.int32) * bins)[:, None]
        total = heads * entries
        filled = pad(keys.flatten(), (0, max(0, _LEAST_SORTED - total)), value=heads * bins)
        ordered, order = (each[:total] for each in filled.sort(stable=True))
        order.view(heads, entries).sub_(torch.arange(0, total, entries)[:, None])
        rows = order.div_(k, rounding_mode="floor")
        if late is not None:
            rows = queries.index_select(0, rows)
        for head, counts in enumerate(torch.bincount(ordered, minlength=heads * bins).view(heads, bins).tolist()):
            begin, blocks = counts[0], []
            for count, k0 in zip(counts[1:], k0s, strict=True):
                if count:
                    blocks.append((begin, count, k0))
                begin += count
            yield Reads(rows[head * entries : (head + 1) * entries], blocks)


def reads_all_before(index: Tensor, pos: Tensor, doc: Tensor | None, block_size: int) -> bool:
    """Whether every query so early in its document that top_k covers all blocks before its own reads them all.

    Together such queries are plain causal attention over the document's beginning, which needs no gather.

    Args:
        index: ``[Hq, T, K - 1]`` of routes that somebody may have chosen by hand.
        pos: ``[T]``.
        doc: ``[T]``; None where all tokens are one document's.
        block_size: tokens in a block.
    """
    early = (index.shape[-1] + 1) * block_size
    if doc is None:
        pos = pos[: max(0, early - int(pos[0]))]
        read = index[:, : len(pos)]
    else:
        at = ((pos < early) & (doc >= 0)).nonzero().flatten()
        pos, read = pos[at], index[:, at]
    heads = max(1, _SORTED_TOGETHER // max(1, pos.numel() * index.shape[-1]))
    # No query reads more than all, so that their sum tells.
    found = sum(int(torch.count_nonzero(some >= 0)) for some in read.split(heads))
    return found == len(index) * int((pos // block_size).sum())
