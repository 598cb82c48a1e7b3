"""``Routes`` as a FlexAttention ``BlockMask``: tile lists from block ranges, never from a token mask."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mobazoo.attention.routing import Routes
from mobazoo.attention.segments import Segments
from mobazoo.attention.tiles import (
    EMPTY,
    FULL,
    PARTIAL,
    TILE,
    MaskMod,
    ceil_div,
    kv_tile_size,
    mask_from_kinds,
)

_NO_BLOCK = -2  # a key in no complete block; differs from an empty slot of Routes

# Working memory of counting, beside its result, in bytes; an entry of Routes takes three int64 and an int32.
_CHUNK_BYTES = 256 << 20
_BYTES_PER_ROUTE = 64
_BYTES_PER_TILE = 16


def block_mask(
    routes: Routes | None,
    segments: Segments,
    length: int,
    q_start: int | Tensor,
    *,
    tile: tuple[int, int] | None = None,
    backward: bool = True,
) -> BlockMask:
    """The tiles that ``length`` queries at ``q_start`` read, and the token mask inside them.

    Exact for any block size, packing and padding: a tile is listed if and only if one of its token pairs is visible,
    and as full if and only if all are. Memory beyond inputs: the table of tiles ``[B, Hq, q_tiles, kv_tiles]`` with
    at most ``TABLE_ENTRIES`` entries (``kv_tile_size`` widens tiles until it holds), 9 bytes an entry or 17 with
    ``backward``, two int32 a token, and 256 MiB to work in. Nothing waits for the device.

    Args:
        routes: blocks each query reads, distinct and complete; None is full attention inside documents.
        segments: the documents of the ``S`` slots.
        length: ``T``.
        q_start: slot of the first query, an int or a 0-dim device tensor.
        tile: queries and keys in a tile (None: 128 and ``kv_tile_size``); Triton wants multiples of 128.
        backward: also the lists that only a backward pass reads.
    """
    tile = tile or tile_shape(routes, segments, length)
    first, last, block = torch.ops.mobazoo.token_tables(
        segments.doc,
        segments.pos,
        routes.start if routes else None,
        routes.block_size if routes else 0,
        length,
        0 if isinstance(q_start, Tensor) else q_start,
        q_start if isinstance(q_start, Tensor) else None,
    )
    kinds = torch.ops.mobazoo.tile_kinds(
        routes.index if routes else None,
        routes.start if routes else None,
        first,
        last,
        routes.block_size if routes else 0,
        segments.length,
        *tile,
    )
    visible = _token_mask(routes, first, last, block)
    return mask_from_kinds(kinds, visible, tile, (length, segments.length), backward)


def tile_shape(routes: Routes | None, segments: Segments, length: int) -> tuple[int, int]:
    """Queries and keys in a tile when the caller does not say."""
    heads = routes.index.shape[1] if routes and routes.index.shape[3] else 1
    rows = segments.batch * heads * ceil_div(length, TILE)
    return TILE, kv_tile_size(rows, segments.length, routes.block_size if routes else None)


def tile_density(routes: Routes, segments: Segments, length: int, q_start: int | Tensor | None = None) -> Tensor:
    """Tiles read over the tiles of full causal attention in the same documents, a 0-dim float32 tensor.

    The cost of masking in place is this share of full attention's, whatever ``top_k * block_size / S`` promises: a
    tile is read when any of its 128 queries wants any of its keys. Near 1, in place is slower than full attention
    (the mask costs too) and queries should be gathered by block instead; it falls when neighbours choose alike.
    """
    first = segments.length - length if q_start is None else q_start
    tile = tile_shape(routes, segments, length)
    tables = []
    for chosen in (routes, None):
        mask = block_mask(chosen, segments, length, first, tile=tile, backward=False)
        assert mask.full_kv_num_blocks is not None
        tables.append((mask.kv_num_blocks + mask.full_kv_num_blocks).float().mean(1).sum())
    return tables[0] / tables[1].clamp(min=1)


def _token_mask(routes: Routes | None, first: Tensor, last: Tensor, block: Tensor) -> MaskMod:
    """Visibility of one pair. Blocks lie in one document and behind their readers, so neither is asked again."""
    width = routes.index.shape[3] if routes else 0

    def own(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv >= first[b, q]) & (kv <= last[q])

    if routes is None or width == 0:
        return own
    index = routes.index

    def own_or_routed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        seen = own(b, h, q, kv)
        for i in range(width):
            seen = seen | (block[b, kv] == index[b, h, q, i])
        return seen

    return own_or_routed


# Opaque for another reason than the next: FlexAttention's CPU kernel takes what a token mask captures only from memory,
# and these would be fused into the graph.
@torch.library.custom_op("mobazoo::token_tables", mutates_args=())
def _token_tables(
    doc: Tensor,
    pos: Tensor,
    start: Tensor | None,
    block_size: int,
    length: int,
    q_start: int,
    q_start_tensor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the token mask looks up, all int32.

    First key of each query's own block (document, for full attention) ``[B, T]``, its own slot ``[T]``, and the block
    of each slot ``[B, S]`` (``[B, 0]`` for full attention). A padding query's first key lies behind the last slot.
    """
    slots = doc.shape[1]
    slot = torch.arange(length, device=doc.device) + (q_start if q_start_tensor is None else q_start_tensor)
    first = slot - (pos[:, slot] % block_size if block_size else pos[:, slot])
    first = torch.where(doc[:, slot] >= 0, first, slots).to(torch.int32)
    block = first.new_empty(doc.shape[0], 0) if start is None else _block_of_slot(start, block_size, slots)
    return first, slot.to(torch.int32), block


@_token_tables.register_fake
def _(
    doc: Tensor,
    pos: Tensor,
    start: Tensor | None,
    block_size: int,
    length: int,
    q_start: int,
    q_start_tensor: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, slots = doc.shape
    shapes = ((batch, length), (length,), (batch, 0 if start is None else slots))
    first, last, block = (torch.empty(shape, dtype=torch.int32, device=doc.device) for shape in shapes)
    return first, last, block


def _block_of_slot(start: Tensor, block_size: int, slots: int) -> Tensor:
    """The number of the block ``[B, S]`` that each slot belongs to, for blocks ``[B, N]`` in any order."""
    number = torch.arange(start.shape[1], dtype=torch.int32, device=start.device).expand_as(start)
    at = torch.full((start.shape[0], slots + 1), _NO_BLOCK, dtype=torch.int32, device=start.device)
    at = at.scatter_(1, torch.where(start < 0, slots, start).long(), number)[:, :slots]
    slot = torch.arange(slots, device=start.device).expand_as(at)
    begin = torch.where(at >= 0, slot, -block_size).cummax(1).values
    return torch.where(slot - begin < block_size, at.gather(1, begin.clamp(min=0)), _NO_BLOCK)


@torch.library.custom_op("mobazoo::tile_kinds", mutates_args=())
def _tile_kinds(
    index: Tensor | None,
    start: Tensor | None,
    first: Tensor,
    last: Tensor,
    block_size: int,
    slots: int,
    q_tile: int,
    kv_tile: int,
) -> Tensor:
    """Kinds of all tiles, int8 ``[B, Hq or 1, q_tiles, kv_tiles]``, by counting the visible pairs of each.

    A query's own range and its blocks are disjoint, so pairs are the sum of overlaps; none is empty, all is full.
    """
    batch, length = first.shape
    heads = index.shape[1] if index is not None and index.shape[3] else 1
    wide, high = ceil_div(slots, kv_tile), ceil_div(length, q_tile)
    device = first.device
    q_sizes = (length - torch.arange(high, device=device) * q_tile).clamp(max=q_tile)
    kv_sizes = (slots - torch.arange(wide, device=device) * kv_tile).clamp(max=kv_tile)
    kinds = torch.empty(batch, heads, high, wide, dtype=torch.int8, device=device)
    width = index.shape[3] if index is not None and start is not None and start.shape[1] else 0
    cost = q_tile * (width + 1) * _BYTES_PER_ROUTE + wide * _BYTES_PER_TILE  # of a query tile of one head
    step_h = max(1, min(heads, _CHUNK_BYTES // (cost * high)))
    step_m = max(1, min(high, _CHUNK_BYTES // (cost * step_h)))
    for b, h, m in product(range(batch), range(0, heads, step_h), range(0, high, step_m)):
        m1 = min(m + step_m, high)
        queries = slice(m * q_tile, m1 * q_tile)
        begin = first[b, queries].minimum(last[queries] + 1)  # padding reads an empty range
        pairs = _count(begin[None, :, None], (last[queries] + 1)[None, :, None], m1 - m, wide, q_tile, kv_tile)
        if index is not None and start is not None and width:
            chosen = index[b, h : h + step_h, queries].long()  # [h, t, K - 1]
            begin = torch.where(chosen < 0, 0, start[b][chosen.clamp(min=0)])
            end = torch.where(chosen < 0, 0, begin + block_size).clamp(max=slots)
            pairs = pairs + _count(begin, end, m1 - m, wide, q_tile, kv_tile)
        everything = (q_sizes[m:m1, None] * kv_sizes).to(pairs.dtype)
        kind = torch.where(pairs == everything, FULL, PARTIAL)
        kinds[b, h : h + step_h, m:m1] = torch.where(pairs == 0, EMPTY, kind).to(torch.int8)
    return kinds


@_tile_kinds.register_fake
def _(
    index: Tensor | None,
    start: Tensor | None,
    first: Tensor,
    last: Tensor,
    block_size: int,
    slots: int,
    q_tile: int,
    kv_tile: int,
) -> Tensor:
    heads = index.shape[1] if index is not None and index.shape[3] else 1
    shape = (first.shape[0], heads, ceil_div(first.shape[1], q_tile), ceil_div(slots, kv_tile))
    return torch.empty(shape, dtype=torch.int8, device=first.device)


def _count(begin: Tensor, end: Tensor, high: int, wide: int, q_tile: int, kv_tile: int) -> Tensor:
    """Keys of the ranges ``begin .. end - 1`` ``[h, t, w]`` in each tile, summed over its queries: ``[h, high, wide]``.

    A prefix ``0 .. x - 1`` covers whole tiles, a rest of one, then nothing. Its differences along the tiles are three
    numbers, the first of which is the same for every prefix and drops out of a range, the difference of two.
    """
    heads, length, _ = begin.shape
    row = torch.arange(length, device=begin.device) // q_tile
    row = (torch.arange(heads, device=begin.device)[:, None] * high + row)[..., None] * (wide + 2)  # [h, t, 1]
    steps = torch.zeros(heads * high * (wide + 2), dtype=torch.int32, device=begin.device)
    for edge, sign in ((end, 1), (begin, -1)):
        at, rest = (row + edge // kv_tile).flatten(), (edge % kv_tile).flatten().to(torch.int32)
        steps.scatter_add_(0, at, sign * (rest - kv_tile))
        steps.scatter_add_(0, at + 1, -sign * rest)
    return steps.view(heads, high, wide + 2).cumsum(2, dtype=torch.int32)[..., :wide]
