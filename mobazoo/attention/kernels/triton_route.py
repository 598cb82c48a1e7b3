"""Launches of the gate's kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mobazoo.attention.kernels import triton_gate
from mobazoo.attention.kernels.slabs import dense
from mobazoo.attention.kernels.triton_slabs import MOST_PAIRS
from mobazoo.attention.kernels.triton_tiles import gate_tiles, power_of_two
from mobazoo.attention.triton_runs import begin

_MEAN_ROWS = 32  # keys summed side by side


def means(k: Tensor, start: Tensor, block_size: int) -> Tensor:
    """``[B, Hkv, N, D]``, the mean key of each block, zeros where ``start`` is -1.

    Args:
        k: ``[B, Hkv, S, D]``.
        start: ``[B, N]`` int32, first slot of each block.
        block_size: tokens in a block.
    """
    begin("centroids", k.dtype, k.shape[3], k.device.type)
    (k,) = dense(k)
    batch, heads, _, dim = k.shape
    blocks = start.shape[1]
    mean = torch.empty(batch, heads, blocks, dim, dtype=k.dtype, device=k.device)
    if mean.numel():
        with torch.cuda.device_of(k):  # Triton launches on the current device
            for rows in _rows(batch, heads):
                triton_gate.means[(blocks, mean[rows].shape[0] * heads)](
                    *(k[rows], start[rows].contiguous(), mean[rows], *k.stride()[:3], blocks, block_size, heads),
                    D=dim,
                    DP=power_of_two(dim),
                    BM=min(_MEAN_ROWS, power_of_two(block_size)),
                )
    return mean


def _rows(batch: int, heads: int) -> Iterator[slice]:
    """Rows of a batch, as many in a launch as may be."""
    step = max(1, MOST_PAIRS // heads)
    return (slice(b, min(b + step, batch)) for b in range(0, batch, step))


def choose(q: Tensor, mean: Tensor, first: Tensor, stop: Tensor, index: Tensor) -> None:
    """Fills ``index`` with the best blocks of each query's ``first .. stop - 1``.

    Args:
        q: ``[B, Hq, T, D]``.
        mean: ``[B, Hkv, N, D]``.
        first: ``[B, T]`` int32, never decreases along a row.
        stop: the same.
        index: ``[B, Hq, T, W]`` int16 or int32, contiguous, with ``N`` and ``W`` above 0.
    """
    begin("gate", q.dtype, q.shape[3], q.device.type)
    q, mean = dense(q, mean)
    batch, hq, length, dim = q.shape
    heads, blocks, reads = mean.shape[1], mean.shape[2], index.shape[3]
    group = hq // heads
    held = gate_tiles(dim, q.element_size(), group * length, reads, blocks, q.device)
    with torch.cuda.device_of(q):
        for rows in _rows(batch, heads):
            triton_gate.gate[(-(-group * length // held.rows), q[rows].shape[0] * heads)](
                *(q[rows], mean[rows], first[rows].contiguous(), stop[rows].contiguous(), index[rows]),
                *(*q.stride()[:3], *mean.stride()[:3], length, blocks, heads, group, reads),
                D=dim,
                DP=power_of_two(dim),
                BM=held.rows,
                BN=held.stream,
                KEPT=1 << (reads - 1).bit_length(),
                num_warps=held.warps,
                num_stages=held.stages,
            )
