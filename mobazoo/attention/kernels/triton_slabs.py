"""What the Triton kernels are told about documents, and how the routed pass is cut to bound its memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mobazoo.attention.kernels import triton_lists

# Partial results and lists of one slab. Reading a large block is so much work that half of it keeps a GPU busy for
# milliseconds; with small blocks smaller slabs would have the GPU wait for launches.
SLAB_BYTES = 512 << 20
_LARGE_BLOCK = 1024

# Programs side by side in the second dimension of a launch, which CUDA bounds: one for each pair.
MOST_PAIRS = 65535

# Of a read beside its partial result: log-sum-exp, the sort's keys and numbers twice over, its block.
_BYTES_PER_READ = 48


@dataclass(frozen=True)
class Layout:
    """Who reads what.

    Attributes:
        doc: ``[B, S]`` int32, ``Segments.doc``.
        pos: ``[B, S]`` int32, ``Segments.pos``.
        index: ``[B, Hq, T, W]``, ``Routes.index``; None where no block is routed.
        start: ``[B, N]`` int32, ``Routes.start``; None with ``index``.
        begin: 1-element int64 tensor, slot of the first query.
        block_size: tokens in a block, 0 for full attention.
        heads: key heads.
        queries: ``T``.
    """

    doc: Tensor
    pos: Tensor
    index: Tensor | None
    start: Tensor | None
    begin: Tensor
    block_size: int
    heads: int
    queries: int

    @property
    def pairs(self) -> int:
        """Rows times key heads."""
        return self.doc.shape[0] * self.heads

    @property
    def width(self) -> int:
        """``W``, the reads of a query."""
        return 0 if self.index is None else self.index.shape[3]

    @property
    def blocks(self) -> int:
        """``N``."""
        return 0 if self.start is None else self.start.shape[1]

    @cached_property
    def _slot(self) -> Tensor:
        return torch.arange(self.queries, device=self.doc.device) + self.begin

    @cached_property
    def real(self) -> Tensor:
        """``[B, T]`` bool, which queries are no padding."""
        return self.doc.index_select(1, self._slot) >= 0

    @cached_property
    def lo(self) -> Tensor:
        """``[B, T]`` int32, the first key that each query reads in its own block; after its slot for padding.

        Never decreases along a row.
        """
        pos = self.pos.index_select(1, self._slot)
        reach = pos % self.block_size if self.block_size else pos
        return torch.where(self.real, self._slot - reach, self._slot + 1).to(torch.int32)

    def readers(self, tile: int) -> Tensor:
        """``[B, tiles]`` int32: no query from this one on reads a tile's keys in its own block."""
        end = torch.arange(1, -(-self.doc.shape[1] // tile) + 1, dtype=torch.int32, device=self.doc.device) * tile
        return torch.searchsorted(self.lo, end.expand(self.lo.shape[0], -1).contiguous(), out_int32=True)

    def blocks_of(self, tile: int) -> tuple[Tensor, Tensor]:
        """``[B, tiles]`` int32 twice: the blocks from the first up to the second have keys in a tile."""
        assert self.start is not None  # for the type checker: there is a routed pass
        slots = self.doc.shape[1]
        begin = torch.arange(-(-slots // tile), dtype=torch.int32, device=self.doc.device) * tile
        begin = begin.expand(self.start.shape[0], -1)
        start = torch.where(self.start < 0, 2 * slots + tile, self.start).int().contiguous()
        first = torch.searchsorted(start, begin - self.block_size, right=True, out_int32=True)
        return first, torch.searchsorted(start, begin + tile, out_int32=True)


@dataclass(frozen=True, slots=True)
class Slab:
    """Pairs ``pair .. pair + pairs - 1``, query tokens ``token .. token + tokens - 1``."""

    pair: int
    pairs: int
    token: int
    tokens: int


def cut(pairs: int, queries: int, per_token: int, block_size: int) -> tuple[int, int]:
    """How many pairs, and how many of their tokens, share a slab: several pairs, or a part of one that is too large.

    Args:
        pairs: rows times key heads.
        queries: tokens of each.
        per_token: bytes that a pair's token needs.
        block_size: tokens in a block.
    """
    budget = SLAB_BYTES // 2 if block_size >= _LARGE_BLOCK else SLAB_BYTES
    per_token = max(1, per_token)
    most = min(MOST_PAIRS, budget // (per_token * queries))
    return _evenly(pairs, most), _evenly(queries, budget // per_token)


def _evenly(number: int, most: int) -> int:
    """The size of as few parts as ``most`` allows, all about the same."""
    return -(-number // -(-number // max(1, most)))


def token_bytes(group: int, width: int, row_bytes: int) -> int:
    """Bytes of partial results and lists that one token of a pair needs, ``row_bytes`` for each partial result."""
    return group * width * (row_bytes + _BYTES_PER_READ)


def slabs(layout: Layout, group: int, row_bytes: int) -> Iterator[tuple[Slab, list[Slab]]]:
    """Some pairs with all their tokens, and the same cut so that partial results stay within ``SLAB_BYTES``.

    Args:
        layout: documents and routes.
        group: query heads of a key head.
        row_bytes: bytes of one partial result.
    """
    pairs, queries = layout.pairs, layout.queries
    together, step = cut(pairs, queries, token_bytes(group, layout.width, row_bytes), layout.block_size)
    for pair in range(0, pairs, together):
        some = min(together, pairs - pair)
        whole = Slab(pair, some, 0, queries)
        yield whole, [Slab(pair, some, t, min(step, queries - t)) for t in range(0, queries, step)]


def lists(layout: Layout, slab: Slab, tile: int) -> triton_lists.Lists:
    """The reads of a slab by block, in tiles of ``tile``."""
    assert layout.index is not None  # for the type checker: there is a routed pass
    tokens = slice(slab.token, slab.token + slab.tokens)
    pairs = slice(slab.pair, slab.pair + slab.pairs)
    index = layout.index.unflatten(1, (layout.heads, -1)).flatten(0, 1)[pairs, :, tokens]  # [P, G, t, W]
    real = layout.real.repeat_interleave(layout.heads, 0)[pairs, tokens]
    return triton_lists.build(index, real, layout.blocks, tile)
