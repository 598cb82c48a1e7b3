"""Block attention by FlexAttention with queries gathered by block, so that cost follows the pairs actually read.

An own-block pass in place, and a routed pass in slabs of queries: the reads of a slab are sorted by block, each
block's rounded up to tiles of 128, and attend to exactly that block's keys where they lie. The partial results are
merged by log-sum-exp.

Memory beyond the own pass: ``_SLAB_BYTES`` for the slab at hand, plus the rounding to tiles, at most
``B * Hkv * min(N, reads) * 127`` rows of gathered queries and as many of results (small blocks make it large), plus a
table of tiles as bounded by ``tiles.TABLE_ENTRIES``. Autograd keeps what every slab gathered and merged, so that the
bound is then ``_bytes_per_token`` times all ``T`` queries.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mobazoo.attention.blockmask import block_mask
from mobazoo.attention.gather import plan, slab_length, take
from mobazoo.attention.kernels import flex as kernel
from mobazoo.attention.merge import merge, merge_parts
from mobazoo.attention.problem import Problem
from mobazoo.attention.routing import Routes
from mobazoo.attention.segments import Segments
from mobazoo.attention.tiles import TILE, ceil_div, kv_tile_size, mask_from_kinds

_SLAB_BYTES = 1 << 30


class Flex(Protocol):
    """What the passes call: ``kernels.flex.flex``, or in tests something that does the same on a CPU."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, *, want_lse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Output and log-sum-exp."""


def unsupported(problem: Problem) -> str | None:
    """CUDA, with and without a backward; float32, float16 and bfloat16."""
    if problem.device == "cpu":
        return "compiled FlexAttention returns no log-sum-exp on a CPU, and merging two passes needs it"
    return kernel.unsupported(problem)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Segments,
    routes: Routes | None,
    q_start: int | Tensor,
    scale: float,
) -> Tensor:
    """Attention over ``routes`` (None: the whole document, one pass); see ``attend`` for shapes."""
    return compute(q, k, v, segments, routes, q_start, scale, kernel.flex)


def compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    routes: Routes | None,
    q_start: int | Tensor,
    scale: float,
    flex: Flex,
    tile: int = TILE,
) -> Tensor:
    """Both passes and their merge with any ``flex``."""
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    length = q.shape[2]
    own = Routes(routes.index[..., :0], routes.start, routes.block_size) if routes else None
    mask = block_mask(own, segments, length, q_start, backward=backward)
    if routes is None or 0 in (routes.index.shape[3], routes.start.shape[1]):
        return flex(q, k, v, mask, scale)[0]
    out, lse = flex(q, k, v, mask, scale, want_lse=True)
    assert lse is not None
    step = slab_length(_SLAB_BYTES, length, _bytes_per_token(q, routes.index.shape[3]), tile)
    merged = []
    for t0 in range(0, length, step):
        slab = slice(t0, t0 + step)
        index = routes.index[:, :, slab]
        part = _routed(q[:, :, slab], k, v, Routes(index, routes.start, routes.block_size), scale, flex, tile, backward)
        merged.append(merge(out[:, :, slab], lse[:, :, slab], *part)[0].to(q.dtype))
    return torch.cat(merged, 2)


def _bytes_per_token(q: Tensor, width: int) -> int:
    """Of a slab: gathered query, partial result twice and once widened, and what the plan takes, for every read."""
    batch, heads, _, dim = q.shape
    return batch * heads * width * (dim * (3 * q.element_size() + 4) + 64)


def _routed(
    q: Tensor, k: Tensor, v: Tensor, routes: Routes, scale: float, flex: Flex, tile: int, backward: bool
) -> tuple[Tensor, Tensor]:
    """Attention of a slab over its routed blocks alone: output ``[B, Hq, T, D]``, log-sum-exp ``[B, Hq, T]``."""
    (batch, hq, length, dim), hkv, slots = q.shape, k.shape[1], k.shape[2]
    width = routes.index.shape[3]
    where = plan(routes.index, routes.start.shape[1], hkv, tile)
    rows = q.unflatten(1, (hkv, hq // hkv)).flatten(2, 3)  # [B, Hkv, G * T, D]
    gathered = take(rows, where.row, where.place.unflatten(2, (-1, width)))  # [B, Hkv, P, D]
    mask = _mask_of_blocks(where.block, routes, slots, tile, backward)
    out, lse = flex(gathered, k, v, mask, scale, want_lse=True)
    assert lse is not None
    parts = take(out, where.place, where.read[..., None]).view(batch, hq, length, width, dim)
    lses = take(lse[..., None], where.place, where.read[..., None])[..., 0]
    lses = torch.where(where.place < 0, float("-inf"), lses).view(batch, hq, length, width)
    return merge_parts(parts, lses)


def _mask_of_blocks(block: Tensor, routes: Routes, slots: int, tile: int, backward: bool) -> BlockMask:
    """Each tile of gathered queries reads the keys of its block ``[B, Hkv, tiles]``, and of block N none.

    Rows of padding in a tile read along: nobody takes their results, so that their gradients are zero.
    """
    batch, heads, high = block.shape
    kv_tile = kv_tile_size(batch * heads * high, slots, routes.block_size)
    begin = torch.nn.functional.pad(torch.where(routes.start < 0, slots, routes.start), (0, 1), value=slots)
    begin = begin[:, None].expand(-1, heads, -1).gather(2, block)  # [B, Hkv, tiles]
    end = torch.where(begin < slots, begin + routes.block_size, begin)
    first = torch.arange(ceil_div(slots, kv_tile), device=block.device) * kv_tile
    stop = (first + kv_tile).clamp(max=slots)
    inside = (begin[..., None] <= first) & (end[..., None] >= stop)
    touched = (begin[..., None] < stop) & (end[..., None] > first)
    kinds = touched.to(torch.int8) + inside.to(torch.int8)  # EMPTY, PARTIAL or FULL

    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv >= begin[b, h, q // tile]) & (kv < end[b, h, q // tile])

    return mask_from_kinds(kinds, visible, (tile, kv_tile), (high * tile, slots), backward)
