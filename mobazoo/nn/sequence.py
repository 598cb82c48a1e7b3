"""Rows shared by several processes: each has a run of the queries, all have every key and value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from mobazoo.errors import InputError


@dataclass(frozen=True)
class RowShare:
    """This process's part of every row.

    Attributes:
        group: the processes that share rows.
        rank: number of this one in it.
        size: how many there are.
    """

    group: ProcessGroup
    rank: int
    size: int

    def part(self, length: int) -> slice:
        """The slots of a row of ``length`` that this process computes.

        Raises:
            InputError: a length that does not divide.
        """
        if length % self.size:
            raise InputError(f"sequence: rows of {length} tokens do not divide over {self.size} processes")
        own = length // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def gather(self, x: Tensor) -> Tensor:
        """``[B, H, T, D]`` of all processes as ``[B, H, S, D]``; gradients are summed back."""
        whole: Tensor = _Gather.apply(x, self)
        return whole


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sequence: RowShare) -> Tensor:
        ctx.sequence = sequence
        # Collectives concatenate along the first dimension, so the sequence goes there.
        rows = x.movedim(2, 0).contiguous()  # [T, B, H, D]
        whole = rows.new_empty(sequence.size * rows.shape[0], *rows.shape[1:])
        distributed.all_gather_into_tensor(whole, rows, group=sequence.group)
        return whole.movedim(0, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        sequence: RowShare = ctx.sequence
        rows = grad.movedim(2, 0).contiguous()  # [S, B, H, D]
        own = rows.new_empty(rows.shape[0] // sequence.size, *rows.shape[1:])
        distributed.reduce_scatter_tensor(own, rows, group=sequence.group)
        return own.movedim(0, 2).contiguous(), None
