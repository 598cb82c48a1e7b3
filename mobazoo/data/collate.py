"""Rows to the batch that a zoo model's forward takes: tensors and host ints only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mobazoo.data.rows import Row

IGNORED = -100
Batch = dict[str, Tensor | int]


@dataclass(frozen=True, slots=True)
class Collator:
    """Pads rows to ``length`` and says where documents begin.

    A batch of whole rows, one document each, is ``input_ids`` and ``labels`` alone, which lets kernels skip their
    masks. Otherwise it also has ``position_ids`` restarting at 0 with each document, ``max_docs`` and ``max_len``, and
    where a row is padded an ``attention_mask``. The first token of a document is no label.

    Attributes:
        length: slots of a row.
        pad: token in empty slots; any will do, it is never read.
        fixed: always give the same tensors and no host ints, as a compiled forward wants them.
    """

    length: int
    pad: int = 0
    fixed: bool = False

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """``input_ids``, ``labels`` ``[B, length]`` int64, and what else the rows need."""
        shape = (len(rows), self.length)
        ids = torch.full(shape, self.pad)
        labels = torch.full(shape, IGNORED)
        positions = torch.zeros(shape, dtype=torch.long)
        mask = torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(rows):
            used = len(row.ids)
            ids[i, :used] = row.ids
            labels[i, :used] = torch.where(row.learn, row.ids.long(), IGNORED)
            positions[i, :used] = torch.cat([torch.arange(size) for size in row.sizes])
            mask[i, :used] = 1
        batch: Batch = {"input_ids": ids, "labels": labels.masked_fill(positions == 0, IGNORED)}
        if self.fixed:
            return batch | {"position_ids": positions, "attention_mask": mask}
        if all(row.sizes == (self.length,) for row in rows):
            return batch
        batch |= {"position_ids": positions}
        if not mask.all():
            batch |= {"attention_mask": mask}
        return batch | {
            "max_docs": max(len(row.sizes) for row in rows),
            "max_len": max(size for row in rows for size in row.sizes),
        }
