"""Who reads which block, on a CPU: the rows of ``Routes`` sorted by block, and runs of them that make good calls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries sorted at once: from 32768 on torch sorts integers by radix.
_SORTED_TOGETHER = 1 << 18

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


def reads_all_before(index: Tensor, doc: Tensor, pos: Tensor, block_size: int) -> Tensor | None:
    """``[T]`` bool, the queries so early in their document that top_k reads every block before theirs, if all do.

    Together such queries are plain causal attention over the document's beginning, which needs no gather. ``index``
    is ``[Hq, T, K - 1]`` of routes that somebody may have chosen by hand: None if they read less.
    """
    early = (pos < (index.shape[-1] + 1) * block_size) & (doc >= 0)
    stop = int(early.nonzero().amax()) + 1 if early.any() else 0
    earlier, later = pos[:stop] // block_size, ~early[:stop]
    heads = max(1, _SORTED_TOGETHER // max(1, stop * index.shape[-1]))
    for some in index[:, :stop].split(heads):
        if not (((some >= 0).sum(-1) == earlier) | later).all():
            return None
    return early
