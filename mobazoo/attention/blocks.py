"""Blocks of a row and their centroids: what the gate knows of the keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from mobazoo.attention.gates import TORCH, TRITON, check_by
from mobazoo.attention.segments import Segments
from mobazoo.errors import InputError

UNUSED = -1

# Bytes of a float32 copy of keys, plenty for any device: a packed row's blocks are gathered.
_GATHER_BYTES = 128 << 20
_CACHED_BYTES = 2 << 20  # and for a CPU's cache


@dataclass(frozen=True)
class Centroids:
    """Means of the keys of every complete block, in the order of their slots.

    Attributes:
        mean: ``[B, Hkv, N, D]`` in the keys' dtype.
        start: ``[B, N]`` int32, slot of each block's first key, ascending; ``-1`` at the end is unused.
        doc: ``[B, N]`` int32, the document it belongs to; ``-1`` is unused.
    """

    mean: Tensor
    start: Tensor
    doc: Tensor


def centroids(k: Tensor, block_size: int, segments: Segments) -> Centroids:
    """Mean key of every complete block (arXiv 2502.13189, equation 6); no gradient flows through it.

    Means are accumulated in float32 and rounded once to the keys' dtype. A block that its document does not fill
    is only ever somebody's own block, so it has no centroid and ``N = S // block_size`` is enough for any packing.

    Args:
        k: ``[B, Hkv, S, D]``, after RoPE.
        block_size: tokens in a block, >= 1.
        segments: the documents of the ``S`` slots.

    Raises:
        InputError: if ``k`` and ``segments`` differ in rows or slots, or a block size that is none.
    """
    return centroids_by(TORCH, k, block_size, segments)


def centroids_by(by: str, k: Tensor, block_size: int, segments: Segments) -> Centroids:
    """``centroids`` by ``torch``, or by ``triton`` with our kernel; the order of sums may differ, not their precision.

    Raises:
        InputError: as ``centroids``, or an unknown ``by``.
        UnsupportedError: ``triton`` where the kernel does not run.
    """
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise InputError(f"centroids: block_size must be an integer >= 1, got {block_size!r}")
    if k.dim() != 4 or (k.shape[0], k.shape[2]) != (segments.batch, segments.length):
        raise InputError(
            f"centroids: k must be [B, Hkv, S, D] with B={segments.batch} and S={segments.length} as in segments, "
            f"got {list(k.shape)}"
        )
    check_by("centroids", by, k.device, k.dtype, k.shape[3])
    start = _complete_blocks(segments, block_size)
    if segments.whole:
        doc = torch.zeros_like(start)
    else:
        doc = torch.where(start >= 0, segments.doc.gather(1, start.clamp(min=0).long()), UNUSED).to(torch.int32)
    with torch.no_grad():
        if segments.whole and by == TORCH:
            mean = _mean_whole(k, block_size)
        else:
            mean = torch.ops.mobazoo.packed_means(k.detach(), start, block_size, by)
    return Centroids(mean, start, doc)


def _complete_blocks(segments: Segments, block_size: int) -> Tensor:
    """``[B, N]`` int32, first slots of the complete blocks, ascending, then -1."""
    n = segments.length // block_size
    if segments.whole:
        grid = torch.arange(n, dtype=torch.int32, device=segments.doc.device) * block_size
        return grid.expand(segments.batch, n)
    last = segments.doc[:, block_size - 1 :]  # document of the slot where a block starting here would end
    head = segments.doc[:, : last.shape[1]]
    is_start = (head >= 0) & (segments.pos[:, : last.shape[1]] % block_size == 0) & (head == last)
    rank = torch.where(is_start, is_start.cumsum(1) - 1, n)
    slot = torch.arange(last.shape[1], dtype=torch.int32, device=segments.doc.device).expand_as(rank)
    start = torch.full((segments.batch, n + 1), UNUSED, dtype=torch.int32, device=segments.doc.device)
    return start.scatter(1, rank, slot)[:, :n]  # slots that start no block all land in column n


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _mean_whole(k: Tensor, block_size: int) -> Tensor:
    n = k.shape[2] // block_size
    blocks = k[:, :, : n * block_size].unflatten(2, (n, block_size))
    if torch.compiler.is_compiling() or k.device.type != "cpu" or k.dtype == _accumulator(k.dtype):
        return blocks.mean(3, dtype=_accumulator(k.dtype)).to(k.dtype)
    mean = k.new_empty(*blocks.shape[:3], k.shape[3])  # here torch widens all keys before it adds them
    for b, heads, some in _parts(blocks.shape, _CACHED_BYTES):
        mean[b, heads, some] = blocks[b, heads, some].mean(2, dtype=_accumulator(k.dtype))
    return mean


def _parts(blocks: torch.Size, most: int) -> Iterator[tuple[int, slice, slice]]:
    """Row, heads and blocks of ``[B, H, N, block size, D]``, ``most`` bytes in float32 but at least one block."""
    batch, heads, n, block_size, dim = blocks
    room = max(1, most // (4 * block_size * dim))  # blocks of one head
    some_heads = max(1, min(heads, room))
    step = max(1, room // some_heads)
    for b in range(batch):
        for h in range(0, heads, some_heads):
            for n0 in range(0, n, step):
                yield b, slice(h, h + some_heads), slice(n0, n0 + step)


# An opaque operator: inlined, its loop over blocks is unrolled into a new graph for every number of blocks.
@torch.library.custom_op("mobazoo::packed_means", mutates_args=())
def _mean_packed(k: Tensor, start: Tensor, block_size: int, by: str = TORCH) -> Tensor:
    """Means ``[B, Hkv, N, D]`` of the blocks that begin at ``start`` [B, N], zeros at -1."""
    if by == TRITON:
        return import_module("mobazoo.attention.kernels.triton_route").means(k, start, block_size)
    batch, heads, _, dim = k.shape
    mean = k.new_empty(batch, heads, start.shape[1], dim)
    inside = torch.arange(block_size, device=k.device)
    for b, some_heads, some in _parts(torch.Size((*mean.shape[:3], block_size, dim)), _GATHER_BYTES):
        slots = start[b, some, None].clamp(min=0) + inside  # [n, block_size]
        keys = k[b, some_heads].index_select(1, slots.flatten()).unflatten(1, slots.shape)
        mean[b, some_heads, some] = keys.mean(2, dtype=_accumulator(k.dtype)).to(k.dtype)
    return mean.masked_fill_((start < 0)[:, None, :, None], 0.0)


@_mean_packed.register_fake
def _(k: Tensor, start: Tensor, block_size: int, by: str = TORCH) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[1], start.shape[1], k.shape[3])
