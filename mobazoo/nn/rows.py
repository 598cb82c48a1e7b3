"""``Rows``: where the documents of a cache's rows stand. One document a row, with padding before it or after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mobazoo.attention import Segments
from mobazoo.errors import InputError


@dataclass
class Rows:
    """What a cache remembers of padding.

    Block grids count from each row's first token, so that a row's centroids are those it would have alone.

    Attributes:
        batch: ``B``.
        first: ``[B]`` int64, slot of each row's first token; None where no row is padded.
        begin: the same on the host, empty where ``first`` is None or only known to the device.
        stop: slot after each row's last token where some row has ended, else empty.
    """

    batch: int
    first: Tensor | None = None
    begin: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._table: Segments | None = None
        self._starts: tuple[int, int, Tensor, Tensor] | None = None

    @classmethod
    def from_mask(cls, mask: Tensor) -> Rows:
        """From a checked ``[B, S]`` mask; one wait for the device, none in a compiled graph."""
        real = mask != 0
        first = torch.where(real.any(1), real.int().argmax(1), mask.shape[1])
        if torch.compiler.is_compiling():
            return cls(mask.shape[0], first)
        length, begin = mask.shape[1], first.tolist()
        stop = [b + n for b, n in zip(begin, real.sum(1).tolist(), strict=True)]
        if not any(begin) and min(stop, default=length) == length:
            return cls(mask.shape[0])
        ended = any(b < s < length for b, s in zip(begin, stop, strict=True))
        return cls(mask.shape[0], first, tuple(begin), tuple(stop) if ended else ())

    def check_continues(self, earlier: Rows, past: int) -> None:
        """Refuses rows whose first token is not where it was.

        Raises:
            InputError: naming the row.
        """
        if earlier.first is not None and not earlier.begin:
            return  # known to the device only
        for b in range(self.batch):
            now, before = (rows.begin[b] if rows.begin else 0 for rows in (self, earlier))
            if now != before and min(now, before) < past:
                raise InputError(
                    f"attention_mask: row {b} begins at slot {now}, in the cache at slot {before}; "
                    "pass the mask of all tokens since the cache was empty"
                )

    def segments(self, length: int, room: int, device: torch.device) -> Segments:
        """The documents of ``length`` slots, rows still open; a view of one table for ``room`` slots."""
        table = self._table
        if table is None or table.length < length or table.doc.device != device:
            table = self._make(max(length, room), device)
            if not torch.compiler.is_compiling():
                self._table = table
        if table.length == length:
            return table
        longest = length - min(self.begin, default=0)
        return Segments(table.doc[:, :length], table.pos[:, :length], 1, longest, whole=table.whole)

    def _make(self, length: int, device: torch.device) -> Segments:
        if self.first is None:
            return Segments.single(self.batch, length, device)
        pos = torch.arange(length, dtype=torch.int32, device=device) - self.first[:, None].to(device, torch.int32)
        doc = torch.where(pos < 0, -1, 0).to(torch.int32)
        return Segments(doc, pos.clamp(min=0), 1, length - min(self.begin, default=0))

    def starts(self, block_size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """First slots of the complete blocks of ``count`` slots and their documents ``[B, N]``, -1 at the end."""
        known = self._starts
        if known is None or known[:2] != (block_size, count) or known[2].device != device:
            grid = torch.arange(count // block_size, dtype=torch.int32, device=device) * block_size
            start = grid.expand(self.batch, -1)
            if self.first is not None:
                start = start + self.first[:, None].to(device, torch.int32)
                start = torch.where(start + block_size > count, -1, start)
            known = (block_size, count, start, start.clamp(max=0))
            if not torch.compiler.is_compiling():
                self._starts = known
        return known[2:]

    def select(self, index: Tensor) -> Rows:
        """The rows ``index`` [B'] of these."""
        if self.first is None:
            return Rows(index.shape[0])
        number = index.tolist()
        begin, stop = (tuple(x[i] for i in number) if x else () for x in (self.begin, self.stop))
        return Rows(index.shape[0], self.first.index_select(0, index.to(self.first.device)), begin, stop)
