"""Which row comes when: a function of seed and row count alone, so that it survives resume and other process counts."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.data import Dataset

from mobazoo.data.rows import Row, Rows


class Shared(Dataset[Row]):
    """Rows for processes of which each ``size`` in a row get the same ones.

    transformers deals batches of ``micro`` rows to the processes in turn; this numbers the rows so that it comes out.

    Args:
        rows: of the run.
        micro: rows in a forward.
        world: processes.
        size: processes that share rows.
    """

    def __init__(self, rows: Dataset[Row], count: int, micro: int, world: int, size: int) -> None:
        self.rows, self.count = rows, count
        self.micro, self.world, self.size = micro, world, size

    def __len__(self) -> int:
        return self.count * self.size

    def __getitem__(self, number: int) -> Row:
        dealt, within = divmod(number, self.micro)
        turn, process = divmod(dealt, self.world)
        batch = turn * (self.world // self.size) + process // self.size
        return self.rows[batch * self.micro + within]


class Order(Dataset[Row]):
    """All rows of a run in order: every row once, shuffled, before any comes again.

    Args:
        rows: the corpus.
        count: rows in the run.
        seed: of the shuffling; each pass has its own order.
    """

    def __init__(self, rows: Rows, count: int, seed: int) -> None:
        self.rows = rows
        self.count = count
        self.seed = seed
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    @property
    def sizes(self) -> dict[int, int]:
        """How many documents of each length there are."""
        return self.rows.sizes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Row:
        passes, at = divmod(number, len(self.rows))
        return self.rows[self._shuffled(passes)[at]]

    def _shuffle(self, passes: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + passes)
        return torch.randperm(len(self.rows), generator=generator).tolist()
