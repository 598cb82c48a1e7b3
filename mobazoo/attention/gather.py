"""Queries gathered by the block they read: one list a key head, each block's part padded to whole tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Where the queries of a slab stand in the lists of their key heads.

    A *read* is one query reading one block, ``E = G * T * W`` of them a key head (``W`` entries a query), numbered
    as ``Routes.index`` is laid out; a *row* is a query ``g * T + t``; a *place* is a position in the padded list.
    """

    row: Tensor  # [B, Hkv, P] int64, the row at each place, -1 is padding
    read: Tensor  # [B, Hkv, P] int64, the read at each place, -1 is padding
    place: Tensor  # [B, Hkv, E] int64, the place of each read, -1 is an empty slot of Routes
    block: Tensor  # [B, Hkv, P // tile] int64, the block that all places of a tile read, N is none


def places(reads: int, blocks: int, tile: int) -> int:
    """``P``: places enough for ``reads`` spread over ``blocks`` in any way, each block's rounded up to whole tiles."""
    return tile * max(1, (reads + min(blocks, reads) * (tile - 1)) // tile)


def plan(index: Tensor, blocks: int, key_heads: int, tile: int) -> Plan:
    """Sorts reads by key head and block; sizes follow from shapes, so that nothing waits for the device.

    Args:
        index: ``[B, Hq, T, W]``, the blocks each query reads, -1 is none.
        blocks: ``N``.
        key_heads: ``Hkv``.
        tile: places in a tile.
    """
    batch, _, _, width = index.shape
    chosen = index.reshape(batch, key_heads, -1).long()  # [B, Hkv, E]
    reads = chosen.shape[2]
    size = places(reads, blocks, tile)
    chosen = torch.where(chosen < 0, blocks, chosen)
    in_order, order = chosen.sort(dim=2, stable=True)
    count = torch.zeros(batch, key_heads, blocks + 1, dtype=torch.int64, device=index.device)
    count = count.scatter_add(2, chosen, torch.ones_like(chosen))
    tiles = (count[..., :blocks] + tile - 1) // tile
    tile_end = tiles.cumsum(2)
    # Reads of a block move from where sorting put them to where its tiles begin; empty slots behind the list.
    shift = torch.nn.functional.pad((tile_end - tiles) * tile, (0, 1)) - (count.cumsum(2) - count)
    at = torch.arange(reads, device=index.device) + shift.gather(2, in_order)
    at = torch.where(in_order == blocks, size, at)
    read = torch.full((batch, key_heads, size + 1), -1, device=index.device).scatter(2, at, order)[..., :size]
    place = torch.empty_like(at).scatter(2, order, torch.where(in_order == blocks, -1, at))
    row = torch.where(read < 0, -1, read // max(1, width))
    number = torch.arange(size // tile, device=index.device).expand(batch, key_heads, -1)
    block = torch.searchsorted(tile_end, number.contiguous(), right=True)
    return Plan(row, read, place, block)


def take(x: Tensor, at: Tensor, users: Tensor) -> Tensor:
    """``x[at]`` along rows: ``[B, H, P, D]`` from ``x`` ``[B, H, R, D]`` and ``at`` ``[B, H, P]``; -1 takes row 0.

    The gradient is a gather too, summed in float32 at least and rounded once, where autograd would add into rows
    atomically in their own dtype and in any order. What is taken with -1 gets none.

    Args:
        x: rows.
        at: which row to take, -1 where it does not matter.
        users: ``[B, H, R, C]``, the up to ``C`` positions in ``at`` that take each row, -1 is none.
    """
    out: Tensor = _Take.apply(x, at, users)
    return out


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, users: Tensor) -> Tensor:
        ctx.save_for_backward(users)
        return _rows(x, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (users,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(*users.shape[:3], grad.shape[3], dtype=wide, device=grad.device)
        for user in users.unbind(3):
            total += torch.where(user[..., None] >= 0, _rows(grad, user), 0.0)
        return total.to(grad.dtype), None, None


def _rows(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(2, at.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[3]))


def slab_length(budget: int, tokens: int, bytes_per_token: int, tile: int) -> int:
    """Queries of a slab: whole tiles, as many as ``budget`` bytes hold, at least one tile."""
    return max(1, min(tokens, max(tile, budget // bytes_per_token // tile * tile)))
