"""What a flash schedule is told about documents and routes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mobazoo.attention.lanes import Piece
from mobazoo.attention.routing import Routes
from mobazoo.attention.segments import Segments


@dataclass(frozen=True, slots=True)
class Layout:
    """Who reads what.

    Attributes:
        doc: ``[B, S]`` int32, ``Segments.doc``.
        pos: ``[B, S]`` int32, ``Segments.pos``.
        index: ``[B, Hq, T, K - 1]``, ``Routes.index``; None is full attention inside documents.
        start: ``[B, N]`` int32, ``Routes.start``, ascending and -1 at the end; None with ``index``.
        q_start: slot of the first query, an int or a 0-dim device tensor.
        block_size: tokens in a block, 0 for full attention.
        max_docs: most documents in a row.
        max_len: most tokens in a document.
        whole: every row is one document that fills it.
    """

    doc: Tensor
    pos: Tensor
    index: Tensor | None
    start: Tensor | None
    q_start: int | Tensor
    block_size: int
    max_docs: int
    max_len: int
    whole: bool

    @classmethod
    def of(cls, segments: Segments, routes: Routes | None, q_start: int | Tensor) -> Layout:
        """That of a whole batch."""
        index, start, block_size = (routes.index, routes.start, routes.block_size) if routes else (None, None, 0)
        known = (segments.max_docs, segments.max_len, segments.whole)
        return cls(segments.doc, segments.pos, index, start, q_start, block_size, *known)

    def cut(self, piece: Piece, group: int) -> Layout:
        """That of a piece, a batch of one; ``group`` query heads share a key head."""
        row = slice(piece.row, piece.row + 1)
        return replace(
            self,
            doc=self.doc[row],
            pos=self.pos[row],
            index=None if self.index is None else self.index[row, piece.queries(group), piece.tokens],
            start=None if self.start is None else self.start[row],
            q_start=self.q_start + piece.tokens.start,
        )
