"""Tables of tiles and the lists FlexAttention reads from them.

A tile is ``q_tile`` queries by ``kv_tile`` keys; a table holds one int8 kind for each: ``EMPTY`` is never read,
``PARTIAL`` is read with the token mask, ``FULL`` is read without one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

EMPTY, PARTIAL, FULL = 0, 1, 2

# Every block size of FlexAttention's Triton configurations, forward and backward, divides 128.
TILE = 128

# A table's entries at the most. A kind takes 1 byte, the lists 8, and the lists of the backward 8 more, so that this
# is 576 MiB in a forward pass and 1088 MiB with a backward.
TABLE_ENTRIES = 1 << 26

_CHUNK_ENTRIES = 4 << 20

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def kv_tile_size(rows: int, slots: int, block_size: int | None) -> int:
    """Keys in a tile: fine enough that a block's edges cost little, coarse enough that the table stays bounded.

    The smallest multiple of 128 that is at least an eighth of the block, divides it if 128 does (or is a multiple of
    it), and leaves at most ``TABLE_ENTRIES`` entries; one tile a row is the floor.

    Args:
        rows: rows of the table, that is query tiles of all batch rows and heads.
        slots: ``S``.
        block_size: None for full attention.
    """
    for size in _sizes(block_size or TILE):
        coarse = 8 * size >= (block_size or 0)
        if size >= slots or (coarse and rows * ceil_div(slots, size) <= TABLE_ENTRIES):
            return size
    raise AssertionError("sizes grow without end")


def _sizes(block_size: int) -> Iterator[int]:
    blocks = block_size // TILE if block_size % TILE == 0 else 1
    yield from (TILE * part for part in range(1, blocks) if blocks % part == 0)
    size = TILE * blocks
    while True:
        yield size
        size *= 2


def ceil_div(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def mask_from_kinds(
    kinds: Tensor, mask_mod: MaskMod, tile: tuple[int, int], lengths: tuple[int, int], backward: bool
) -> BlockMask:
    """The ``BlockMask`` of a table.

    Args:
        kinds: int8 ``[B, H, q_tiles, kv_tiles]``; ``B`` or ``H`` may be 1 to hold for all.
        mask_mod: visibility of one token pair, consulted in partial tiles.
        tile: queries and keys in a tile.
        lengths: queries and keys of the problem.
        backward: also the lists by key tile, which only a backward pass reads.
    """
    partial, which_partial = torch.ops.mobazoo.tile_list(kinds, PARTIAL)
    full, which_full = torch.ops.mobazoo.tile_list(kinds, FULL)
    mask = BlockMask.from_kv_blocks(
        partial,
        which_partial,
        full,
        which_full,
        BLOCK_SIZE=tile,
        mask_mod=mask_mod,
        seq_lengths=lengths,
        compute_q_blocks=False,
    )
    if backward:  # torch's own transposition takes several int64 tables
        mask.q_num_blocks, mask.q_indices = torch.ops.mobazoo.tile_list(kinds.mT, PARTIAL)
        mask.full_q_num_blocks, mask.full_q_indices = torch.ops.mobazoo.tile_list(kinds.mT, FULL)
    return mask


# Opaque operators: how many chunks they take depends on shapes, which would unroll into a compiled graph.
@torch.library.custom_op("mobazoo::tile_list", mutates_args=())
def _tile_list(kinds: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Of each row, how many tiles are of a kind ``[B, H, R]`` and which ``[B, H, R, C]``, both int32, rest zeros."""
    *rows, width = kinds.shape
    flat = kinds.reshape(-1, width)
    number = torch.zeros(flat.shape[0], dtype=torch.int32, device=kinds.device)
    which = torch.zeros(flat.shape, dtype=torch.int32, device=kinds.device)
    column = torch.arange(width, dtype=torch.int32, device=kinds.device)
    step = max(1, _CHUNK_ENTRIES // max(1, width))
    for r in range(0, flat.shape[0], step):
        here = flat[r : r + step] == kind
        rank = here.cumsum(1, dtype=torch.int32)
        number[r : r + step] = rank[:, -1]
        packed = torch.zeros(here.shape[0], width + 1, dtype=torch.int32, device=kinds.device)
        place = torch.where(here, rank - 1, width).long()  # tiles of other kinds all land in the last column
        which[r : r + step] = packed.scatter_(1, place, column.expand_as(place))[:, :width]
    return number.view(rows), which.view(kinds.shape)


@_tile_list.register_fake
def _(kinds: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    shape = kinds.shape
    return (
        torch.empty(shape[:-1], dtype=torch.int32, device=kinds.device),
        torch.empty(shape, dtype=torch.int32, device=kinds.device),
    )
