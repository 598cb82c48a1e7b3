"""Who reads a block: the reads of a slab sorted by key head and block, built on the device from shapes alone.

A *read* is one query reading one block, numbered as ``[P, G, t, W]`` is laid out (``P`` pairs of row and key head,
``t`` tokens, ``W = top_k - 1``). A *cell* is one pair's block; the last cell of each pair, number ``N``, holds its
empty slots. See docs/kernels.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Lists(NamedTuple):
    """Reads by cell, and the tiles that cover them."""

    order: Tensor  # [P * E] int32, reads by cell, in a cell by head and token
    edge: Tensor  # [P * (N + 1) + 1] int32, cell c holds order[edge[c] : edge[c + 1]]
    cell: Tensor  # [tiles] int32, the cell of each tile; P * (N + 1) where a tile is not needed
    first: Tensor  # [P * (N + 1)] int32, the first tile of each cell
    block: Tensor  # [P * E] int32, the block of each read, N is none


def most_tiles(reads: int, cells: int, tile: int) -> int:
    """Tiles enough for ``reads`` spread over ``cells`` in any way: each cell wastes less than one."""
    return (reads + min(cells, reads) * (tile - 1)) // tile


def build(index: Tensor, real: Tensor, blocks: int, tile: int) -> Lists:
    """Sorts the reads of a slab; sizes follow from shapes, so that nothing waits for the device.

    Args:
        index: ``[P, G, t, W]``, the blocks each query reads, -1 is none.
        real: ``[P, t]`` bool, which queries are no padding.
        blocks: ``N``.
        tile: reads in a tile.
    """
    pairs, device = index.shape[0], index.device
    cells = pairs * (blocks + 1)
    block = torch.where((index >= 0) & real[:, None, :, None], index, blocks).int().flatten(1)  # [P, E]
    number = torch.arange(pairs, dtype=torch.int32, device=device)[:, None] * (blocks + 1)
    in_order, order = (block + number).flatten().sort(stable=True)
    edge = torch.searchsorted(in_order, torch.arange(cells + 1, dtype=torch.int32, device=device), out_int32=True)
    count = edge.diff().view(pairs, blocks + 1)
    needed = torch.nn.functional.pad((count[:, :blocks] + tile - 1) // tile, (0, 1)).flatten()
    end = needed.cumsum(0, dtype=torch.int32)
    bound = most_tiles(order.shape[0], pairs * blocks, tile)
    cell = torch.searchsorted(end, torch.arange(bound, dtype=torch.int32, device=device), right=True, out_int32=True)
    return Lists(order.int(), edge, cell, end - needed, block.flatten())
