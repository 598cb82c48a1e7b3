"""How the flash schedule on a GPU is cut into slabs, so that its working memory has a bound for any length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from mobazoo.attention.kernels.sequences import own_runs, routed_runs

# Bytes of what a slab holds for its queries: see `query_bytes`.
SLAB_BYTES = 512 << 20

_ENTRY_INDEX_BYTES = 64  # keys and permutations of the sort, its scratch, log-sum-exp, weight, mask
_PAD_ROWS = 128  # kernels keep that many rows between two runs in their backward's float32 gradient of queries
_MOST_TOKENS = (1 << 31) - 1  # cumulated lengths are int32


class Shape(NamedTuple):
    """The host ints a schedule is planned from."""

    batch: int
    key_heads: int
    group: int
    queries: int
    slots: int
    dim: int
    itemsize: int
    parts: int  # routed blocks a query may read
    blocks: int  # N
    block_size: int
    max_docs: int
    whole: bool


class Slab(NamedTuple):
    """Some rows and key heads with their query heads, and a range of query tokens: of one pair, or all tokens."""

    rows: slice
    heads: slice
    queries: slice
    tokens: slice

    @property
    def pairs(self) -> int:
        """Rows times key heads."""
        return (self.rows.stop - self.rows.start) * (self.heads.stop - self.heads.start)


def query_bytes(shape: Shape, *, backward: bool) -> int:
    """Bytes that one query token of one pair holds while its slab runs; ``e`` is the bytes of an element.

    Forward ``G * ((K - 1) * (2 e D + 64) + 2 e D + 12 D)``: gathered queries and outputs, sort and log-sum-exps of the
    routed pass; own queries and outputs, and the float32 result. Backward
    ``G * ((K - 1) * ((4 e + 4) D + 64) + (4 e + 12) D)``: also output gradients and the kernel's float32 gradients.
    """
    rows, wide = (4, 4) if backward else (2, 0)
    entry = (rows * shape.itemsize + wide) * shape.dim
    own = entry + (8 if backward else 12) * shape.dim
    return shape.group * (shape.parts * (entry + _ENTRY_INDEX_BYTES) + own)


def key_bytes(shape: Shape, *, flat: bool, backward: bool) -> int:
    """Bytes that one pair holds beside its queries: a copy of its keys and values unless they are ``flat``, and in the
    backward float32 accumulators, the kernel's gradients for each query head, and the rows it keeps between runs.
    """
    keys = 2 * shape.slots * shape.dim * shape.itemsize
    if not backward:
        return 0 if flat else keys
    runs = shape.group * own_runs(shape.slots, shape.block_size, shape.max_docs)
    runs += routed_runs(shape.blocks, whole=shape.whole) if shape.parts else 0
    return keys * (2 + shape.group) + 8 * shape.slots * shape.dim + 4 * _PAD_ROWS * shape.dim * runs


def slabs(shape: Shape, *, flat: bool, backward: bool) -> Iterator[tuple[Slab, ...]]:
    """Slabs in groups that share rows and key heads, so that one group's key gradients are summed in one place.

    A pair with more queries than fit is cut by tokens. Pairs with fewer share a slab, as many as fit: if their keys
    can be read in place (``flat``), or are no more to copy than the queries that are gathered anyway.

    The bytes of a slab's queries stay within ``SLAB_BYTES`` (or are one query token's, if that is more); what the
    pairs of a slab hold for keys comes on top for a slab of one pair, and is within the bound for more.
    """
    per_query = query_bytes(shape, backward=backward)
    per_pair = shape.queries * per_query + key_bytes(shape, flat=flat, backward=backward)
    pairs = max(1, min(SLAB_BYTES // per_pair, _MOST_TOKENS // shape.slots))
    if not flat and shape.slots > shape.group * shape.queries * (shape.parts + 1):
        pairs = 1
    rows, heads = (max(1, pairs // shape.key_heads), min(pairs, shape.key_heads))
    tokens = shape.queries if rows * heads > 1 else max(1, SLAB_BYTES // per_query)
    for b in range(0, shape.batch, rows):
        for j in range(0, shape.key_heads, heads):
            of_rows = slice(b, min(b + rows, shape.batch))
            of_heads = slice(j, min(j + heads, shape.key_heads))
            of_queries = slice(of_heads.start * shape.group, of_heads.stop * shape.group)
            yield tuple(
                Slab(of_rows, of_heads, of_queries, slice(t, min(t + tokens, shape.queries)))
                for t in range(0, shape.queries, tokens)
            )


def is_flat(x: Tensor) -> bool:
    """Whether ``[B, H, S, D]`` is one array of tokens in memory, ``[B * H * S, D]``."""
    batch, heads, slots, _ = x.shape
    by_head = heads == 1 or x.stride(1) == slots * x.stride(2)
    by_row = batch == 1 or x.stride(0) == heads * slots * x.stride(2)
    return by_head and by_row and x.stride(3) == 1


def dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Kernels read a head's numbers side by side: tensors copied where the last dimension is strided."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
