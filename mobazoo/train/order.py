"""Which row comes when: a function of seed and row count alone, so that it survives resume and other process counts."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.utils.data import Dataset

from mobazoo.data.rows import Row, Rows


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

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Row:
        passes, at = divmod(number, len(self.rows))
        return self.rows[self._shuffled(passes)[at]]

    def _shuffle(self, passes: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + passes)
        return torch.randperm(len(self.rows), generator=generator).tolist()
