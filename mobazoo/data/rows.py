"""Documents packed into rows of one length; a document longer than a row is cut into several."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mobazoo.data.tokens import Tokens
from mobazoo.errors import InputError

_SHORTEST = 2  # one token alone predicts nothing


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of a row and the documents they belong to; at the end of the row there may be room left.

    Attributes:
        ids: ``[n]`` int32, ``n <= length``.
        learn: ``[n]`` bool.
        sizes: tokens of each document of the row, in order; their sum is ``n``.
    """

    ids: Tensor
    learn: Tensor
    sizes: tuple[int, ...]


class Rows(Dataset[Row]):
    """Packed rows of a corpus, by number. Positions and the block grid restart with every document.

    Args:
        tokens: the corpus.
        length: slots of a row.

    Raises:
        InputError: no document has two tokens.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens = tokens
        self.length = length
        self.plan = pack(tokens.lengths, length)
        if not self.plan:
            raise InputError("data: no document has more than one token, so there is nothing to predict")

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> Row:
        pieces = self.plan[number]
        return Row(
            _joined(self.tokens.ids, pieces), _joined(self.tokens.learn, pieces), tuple(size for _, size in pieces)
        )

    @property
    def used(self) -> int:
        """Tokens in all rows, padding not counted."""
        return sum(size for row in self.plan for _, size in row)


def _joined(flat: Tensor, pieces: Sequence[tuple[int, int]]) -> Tensor:
    parts = [flat[start : start + size] for start, size in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pack(lengths: Sequence[int], length: int) -> list[list[tuple[int, int]]]:
    """Rows as lists of ``(first token in the corpus, tokens)``.

    Whole rows are cut off long documents; what is left, and short documents, go largest first into the fullest row
    that has room (best fit decreasing), so that no more than the cuts at ``length`` are ever made and little is padded.
    The result depends on ``lengths`` and ``length`` only.

    Example:
        >>> pack([5, 3, 2], 4)
        [[(0, 4)], [(5, 3)], [(8, 2)]]
    """
    if length < _SHORTEST:
        raise InputError(f"length: want at least {_SHORTEST} tokens in a row, got {length}")
    rows: list[list[tuple[int, int]]] = []
    rest: list[tuple[int, int]] = []
    start = 0
    for size in lengths:
        at = start
        while start + size - at >= length:
            rows.append([(at, length)])
            at += length
        if start + size - at >= _SHORTEST:
            rest.append((at, start + size - at))
        start += size
    rooms: list[tuple[int, int]] = []  # sorted by room left, then row
    for piece in sorted(rest, key=lambda piece: -piece[1]):
        found = bisect_left(rooms, (piece[1], 0))
        if found < len(rooms):
            room, row = rooms.pop(found)
            rows[row].append(piece)
        else:
            room, row = length, len(rows)
            rows.append([piece])
        if room - piece[1] >= _SHORTEST:
            insort(rooms, (room - piece[1], row))
    return rows
