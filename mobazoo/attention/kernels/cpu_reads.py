"""Who reads which block, on a CPU: the rows of ``Routes`` sorted by block, and runs of them that make good calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries of routes that are compared at once.
_TOGETHER = 1 << 18

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


def reads_by_block(index: Tensor, start: Tensor, late: Tensor | None) -> Iterator[Reads]:
    """The readers of every key head's blocks, in order of key heads.

    Args:
        index: ``[Hkv, G, T, K - 1]`` of ``Routes``.
        start: ``[N]``.
        late: int64, the queries whose entries count, ascending (None: all).
    """
    hkv, _, _, k = index.shape
    if not k or (late is not None and not len(late)):
        yield from [Reads.none()] * hkv
        return
    k0s = start.tolist()
    for of_head in index:
        rows, counts = _readers(of_head, len(k0s), late)
        begin, blocks = 0, []
        for count, k0 in zip(counts.tolist(), k0s, strict=True):
            if count:
                blocks.append((begin, count, k0))
            begin += count
        yield Reads(rows[:begin], blocks)


def _readers(index: Tensor, blocks: int, late: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows in order of the blocks that they read, and how many read each ``[blocks]``; ``index [G, T, K - 1]``."""
    group, length, k = index.shape
    queries = torch.arange(group)[:, None] * length + (torch.arange(length) if late is None else late)
    keys, order = (index if late is None else index[:, late]).flatten().int().sort(stable=True)
    counts = torch.bincount(keys + 1, minlength=blocks + 1)  # -1 is an empty place
    return queries.flatten()[order[counts[0] :].div_(k, rounding_mode="floor")], counts[1:]


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
    heads = max(1, _TOGETHER // max(1, pos.numel() * index.shape[-1]))
    # No query reads more than all, so that their sum tells.
    found = sum(int(torch.count_nonzero(some >= 0)) for some in read.split(heads))
    return found == len(index) * int((pos // block_size).sum())
