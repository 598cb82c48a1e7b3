"""``Segments``: which document every slot of a packed row belongs to. Built once per batch, not per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from mobazoo.errors import InputError

PADDING = -1


@dataclass(frozen=True)
class Segments:
    """Documents packed in each row.

    Documents are contiguous and never see each other; padding may stand before, between or after them.
    The constructors check that; a ``Segments`` made by hand is taken at its word, except for shapes and dtypes.

    Attributes:
        doc: ``[B, S]`` int32, the document's number in its row, ``-1`` is padding.
        pos: ``[B, S]`` int32, position inside the document, 0 at padding.
        max_docs: host int, no row holds more documents.
        max_len: host int, no document is longer.
        whole: host flag, every row is one document that fills it; kernels may then skip the masks.
    """

    doc: Tensor
    pos: Tensor
    max_docs: int
    max_len: int
    whole: bool = False

    def __post_init__(self) -> None:
        if self.doc.dim() != 2 or self.doc.shape != self.pos.shape:
            raise InputError(
                f"Segments: doc and pos must both be [B, S], got {list(self.doc.shape)} and {list(self.pos.shape)}"
            )
        if not self.doc.dtype == self.pos.dtype == torch.int32:
            raise InputError(f"Segments: doc and pos must be int32, got {self.doc.dtype} and {self.pos.dtype}")

    @property
    def batch(self) -> int:
        """``B``, the number of rows."""
        return self.doc.shape[0]

    @property
    def length(self) -> int:
        """``S``, the number of slots of a row."""
        return self.doc.shape[1]

    def to(self, device: torch.device | str) -> Segments:
        """The same documents on another device."""
        return replace(self, doc=self.doc.to(device), pos=self.pos.to(device))

    @classmethod
    def single(cls, batch: int, length: int, device: torch.device | str | None = None) -> Segments:
        """Every row is one document that fills it."""
        doc = torch.zeros(batch, length, dtype=torch.int32, device=device)
        pos = torch.arange(length, dtype=torch.int32, device=device).expand(batch, length)
        return cls(doc, pos, max_docs=1, max_len=length, whole=True)

    @classmethod
    def from_lengths(
        cls,
        rows: Sequence[Sequence[int]],
        device: torch.device | str | None = None,
        *,
        length: int | None = None,
    ) -> Segments:
        """Documents of the given lengths laid end to end from the start of each row of ``length`` slots.

        The rest is padding; by default the longest row has none.

        Example: ``Segments.from_lengths([[3, 2], [4]])`` is two rows of five slots, the second ends in padding.

        Raises:
            InputError: a negative length, or a row whose documents do not fit ``length``.
        """
        used = [sum(row) for row in rows]
        if any(n < 0 for row in rows for n in row):
            raise InputError(f"Segments.from_lengths: document lengths must be >= 0, got {list(map(list, rows))}")
        length = max(used, default=0) if length is None else length
        if max(used, default=0) > length:
            worst = max(range(len(used)), key=used.__getitem__)
            raise InputError(
                f"Segments.from_lengths: row {worst} holds {used[worst]} tokens, more than length={length}"
            )
        kept = [[n for n in row if n > 0] for row in rows]
        doc = torch.full((len(kept), length), PADDING, dtype=torch.int32)
        pos = torch.zeros(len(kept), length, dtype=torch.int32)
        for b, row in enumerate(kept):
            if row:
                sizes = torch.tensor(row)
                number = torch.arange(len(row), dtype=torch.int32)
                doc[b, : used[b]] = number.repeat_interleave(sizes)
                first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
                pos[b, : used[b]] = torch.arange(used[b]) - first
        return cls(
            doc.to(device) if device is not None else doc,
            pos.to(device) if device is not None else pos,
            max_docs=max((len(row) for row in kept), default=0),
            max_len=max((n for row in kept for n in row), default=0),
            whole=length > 0 and all(row == [length] for row in kept),
        )

    @classmethod
    def from_attention_mask(cls, mask: Tensor) -> Segments:
        """One document a row, from a ``[B, S]`` mask of ones (tokens) and zeros (left or right padding).

        Raises:
            InputError: another shape, values besides 0 and 1, or padding between tokens of a row.
        """
        if mask.dim() != 2:
            raise InputError(
                f"Segments.from_attention_mask: mask must be [B, S] with 1 at tokens, got shape {list(mask.shape)}"
            )
        real = mask != 0
        return _from_starts(_first_of_run(real), real, "from_attention_mask", single=True, values=mask)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, length: int | None = None, max_len: int | None = None) -> Segments:
        """One row whose documents end at the cumulated lengths ``[0, n0, n0 + n1, ...]``, as varlen kernels take them.

        Args:
            cu_seqlens: 1-D integer tensor, first 0, never decreasing; repeated values are empty documents.
            length: slots of the row (default: the last value); the rest is padding.
            max_len: longest document. With ``length`` and ``max_len`` given nothing waits for the device and
                nothing is checked.
        """
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.is_floating_point():
            raise InputError(
                "Segments.from_cu_seqlens: cu_seqlens must be a 1-D integer tensor [0, n0, n0 + n1, ...], "
                f"got shape {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        if length is None or max_len is None:
            ends = cu_seqlens.tolist()
            sizes = [b - a for a, b in pairwise(ends)]
            if ends[0] != 0 or min(sizes, default=0) < 0:
                raise InputError(f"Segments.from_cu_seqlens: must start at 0 and never decrease, got {ends[:8]}")
            return cls.from_lengths([sizes], cu_seqlens.device, length=length)
        slot = torch.arange(length, device=cu_seqlens.device)
        number = torch.searchsorted(cu_seqlens, slot, right=True) - 1
        real = slot < cu_seqlens[-1]
        first = cu_seqlens[number.clamp(0, cu_seqlens.shape[0] - 1)]
        doc = torch.where(real, number, PADDING).to(torch.int32)
        pos = torch.where(real, slot - first, 0).to(torch.int32)
        return cls(doc[None], pos[None], max_docs=cu_seqlens.shape[0] - 1, max_len=max_len)

    @classmethod
    def from_position_ids(
        cls,
        position_ids: Tensor,
        mask: Tensor | None = None,
        max_docs: int | None = None,
        max_len: int | None = None,
    ) -> Segments:
        """Documents from ``[B, S]`` position ids: a new one starts wherever the position does not grow by one.

        Args:
            position_ids: positions that restart at 0 with every document. The first document of a row may start
                anywhere (left padding without a corrected position); ``pos`` counts from its first token.
            mask: ``[B, S]``, 0 at padding.
            max_docs: most documents in a row, from the collator.
            max_len: longest document, from the collator. With both given nothing waits for the device and nothing
                is checked; a compiled forward without them uses the bounds ``(S, S)``.

        Raises:
            InputError: shapes that differ, or a document that is not contiguous.
        """
        if position_ids.dim() != 2 or (mask is not None and mask.shape != position_ids.shape):
            shape = None if mask is None else list(mask.shape)
            raise InputError(
                "Segments.from_position_ids: position_ids and mask must both be [B, S], "
                f"got {list(position_ids.shape)} and {shape}"
            )
        real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask != 0
        step = torch.ones_like(real)
        step[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        start = real & (step | _first_of_run(real))
        return _from_starts(
            start,
            real,
            "from_position_ids",
            max_docs=max_docs,
            max_len=max_len,
            position_ids=position_ids,
            values=mask,
        )


def first_slot(what: str, queries: int, slots: int, q_start: int | Tensor | None) -> int | Tensor:
    """Slot of the first of so many queries, None being the last they can begin at; ``what`` begins an error.

    A tensor's value is read, and checked, on a CPU outside of compiled graphs.

    Raises:
        InputError: more queries than slots, no integer, or out of range.
    """
    last = slots - queries
    if last < 0:
        raise InputError(
            f"{what}: T={queries} queries but S={slots} keys; the queries' own tokens must be among the keys"
        )
    if q_start is None:
        return last
    if isinstance(q_start, Tensor):
        if q_start.dim() or q_start.is_floating_point():
            raise InputError(
                f"{what}: q_start must be an int or a 0-dim integer tensor, got {list(q_start.shape)} {q_start.dtype}"
            )
        if q_start.device.type != "cpu" or torch.compiler.is_compiling():
            return q_start  # its value is the device's business
        q_start = int(q_start)
    if not isinstance(q_start, int | torch.SymInt):
        raise InputError(f"{what}: q_start must be an int or a 0-dim integer tensor, got {q_start!r}")
    if not 0 <= q_start <= last:
        raise InputError(f"{what}: q_start must be in 0 .. S - T = {last}, got {q_start}")
    return q_start


def _first_of_run(real: Tensor) -> Tensor:
    """Where ``real`` [B, S] turns from False to True."""
    first = real.clone()
    first[:, 1:] &= ~real[:, :-1]
    return first


def _from_starts(
    start: Tensor,
    real: Tensor,
    where: str,
    *,
    max_docs: int | None = None,
    max_len: int | None = None,
    single: bool = False,
    position_ids: Tensor | None = None,
    values: Tensor | None = None,
) -> Segments:
    """Segments from where documents start and which slots are tokens; at most one wait, for checks and host ints."""
    length = start.shape[1]
    slot = torch.arange(length, device=start.device)
    number = start.cumsum(1)
    first = torch.where(start, slot, 0).cummax(1).values if length else slot.expand_as(start)
    doc = torch.where(real, number - 1, PADDING).to(torch.int32)
    pos = torch.where(real, slot - first, 0).to(torch.int32)
    whole = False
    if torch.compiler.is_compiling():  # no waiting inside a graph
        max_docs = length if max_docs is None else max_docs
        max_len = length if max_len is None else max_len
    elif (max_docs is None or max_len is None) and start.numel():
        # A document after the row's first that does not begin at position 0 is the rest of one with a hole in it.
        torn = start & (position_ids != 0) & (number > 1) if position_ids is not None else start & (number > 1) & single
        odd = (values != 0) & (values != 1) if values is not None else torch.zeros_like(real)
        rows, docs, longest, fewest, odd_rows = torch.stack(
            [
                torch.where(torn.any(1), torch.arange(len(start), device=start.device), len(start)).min(),
                number.max(),
                (torch.where(real, pos, -1) + 1).max(),
                (real.all(1) & (number[:, -1] == 1)).min(),
                odd.sum(),
            ]
        ).tolist()
        if odd_rows:
            raise InputError(f"Segments.{where}: the mask must hold 0 (padding) and 1 (token) only")
        if rows < len(start):
            raise InputError(
                f"Segments.{where}: row {rows} has a document that is not contiguous; padding may stand before, "
                "between or after documents, not inside one, and packed documents must restart at position 0"
            )
        max_docs, max_len, whole = docs, longest, bool(fewest)
    return Segments(doc, pos, max_docs=max_docs or 0, max_len=max_len or 0, whole=whole)
