"""Gradients in bfloat16 on a CPU by matrix products.

The flash kernel's backward spends as much time around its five products as on them. Two of the five here end in what
follows them: oneDNN makes a product's float32 sums weights, and multiplies another's by them, before it rounds. Nothing
is rounded that stands in an exponent.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import e, frexp, log, log2

import torch
from torch import Tensor

from mobazoo.attention.kernels.cpu_own import Tile, pieces_of, strip_mask
from mobazoo.attention.kernels.cpu_rows import add, gather

# Scores of one call; keys beyond which, and queries below which, the kernel is as fast.
_SCORES = 1 << 19
_MOST_KEYS = 4096
_LEAST_QUERIES = 128
# Readers of a block are filled up to a multiple: oneDNN compiles a product for every size it meets.
_MULTIPLE = 64
# Rows that are widened at once.
_ROWS = 1024
# oneDNN ends a product in a sigmoid, not in an exponential: they are equal far below zero. Weights are divided by this
# power of two, which leaves a difference of 2 ** -16 of a weight, and gradients of the output multiplied by it.
_SHIFT = 16
_NEVER = 1e30  # as the log-sum-exp of a query, takes all its weights away


def products_pay(dtype: torch.dtype, queries: int, keys: int) -> bool:
    """Whether products are faster than the kernel on this processor, for calls of so many queries and keys."""
    few, many = keys <= _MOST_KEYS, queries >= _LEAST_QUERIES
    return dtype == torch.bfloat16 and few and many and _multiplies_bfloat16()


def own_products_pay(dtype: torch.dtype, tile: Tile) -> bool:
    """Whether they are faster for a tile of own-block work."""
    # One piece alone is the rest of a document: too many different sizes to compile products for.
    equal = tile.strip and tile.count > 1
    return equal and products_pay(dtype, tile.count * tile.q_len, tile.k_len)


@cache
def _multiplies_bfloat16() -> bool:
    # Where the processor cannot, oneDNN takes bfloat16 all the same, and widens it.
    able = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
    return able and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Products:
    """One key head's gradients, from the merged output and log-sum-exp.

    Args:
        rowwise: dout, q and out, each ``[G, T, D]``, bfloat16, contiguous.
        lse: ``[G, T]``, float32.
        k, v: ``[S, D]``, bfloat16.
        sums: what the gradients of ``q``, ``k`` and ``v`` are added to, float32, contiguous.
        scale: of the scores.
    """

    def __init__(
        self, rowwise: list[Tensor], lse: Tensor, k: Tensor, v: Tensor, sums: list[Tensor], scale: float
    ) -> None:
        dout, q, out = rowwise
        dtype = q.dtype
        self.sums, self.scale = sums, scale
        # (dout, delta) . (v, -1): a weight's gradient less its row's mean, which would cancel digits if rounded before.
        delta = _row_sums(dout, out)
        dout = torch.cat([dout, *_parts(delta, 2, dtype)], -1).mul_(2.0**_SHIFT)
        v = torch.cat([v, v.new_full((len(v), 2), -1.0)], -1)
        # For own blocks: powers of two cost less than powers of e.
        self.of_own = q, dout, (lse * log2(e) + _SHIFT)[..., None]
        self.own_keys = k, k.float() * (scale * log2(e)), v
        # For readers of other blocks, (q, lse) . (scaled k, -1): a weight's logarithm. A power of two scales k exactly.
        scaled = _parts(k.float() * scale, 1 if frexp(scale)[0] == 0.5 else 2, dtype)
        with_lse = torch.cat([*[q] * len(scaled), *_parts(lse[..., None] + _SHIFT * log(2), 3, dtype)], -1)
        self.of_readers = with_lse.flatten(0, 1), dout.flatten(0, 1)
        self.read_keys = k, torch.cat([*scaled, k.new_full((len(k), 3), -1.0)], -1), v

    def own(self, tile: Tile, q_start: int) -> None:
        """Adds one tile of own-block work, a strip."""
        most = max(1, _SCORES // (tile.q_len * tile.k_len))  # pieces of a query head
        group = self.of_own[0].shape[0]
        heads, step = min(group, most), max(1, most // group)
        for done in range(0, tile.count, step):
            on, count = done * tile.stride, min(step, tile.count - done)
            few = replace(tile, q_start=tile.q_start + on, k_start=tile.k_start + on, count=count)
            for head in range(0, group, heads):
                self._own(few, few.q_start - q_start, slice(head, head + heads))

    def _own(self, tile: Tile, at: int, heads: slice) -> None:
        q, dout, lse = (
            pieces_of(x[heads], at, tile.q_len, tile).transpose(0, 1).flatten(1, 2) for x in self.of_own
        )  # [count, G * q_len, ...]: keys of a piece are multiplied with its queries of all heads at once
        group = q.shape[1] // tile.q_len
        lse = lse - strip_mask(tile.q_len, tile.k_len, group, lse.dtype)
        k, wide_k, v = (pieces_of(x, tile.k_start, tile.k_len, tile) for x in self.own_keys)
        weights = (q.to(wide_k.dtype) @ wide_k.mT).sub_(lse).exp2_()
        slopes = (dout @ v.mT).to(weights.dtype).mul_(weights).to(q.dtype)
        dq, dk, dv = slopes @ k, slopes.mT @ q, weights.to(q.dtype).mT @ dout[..., : q.shape[-1]]
        dq_sum, dk_sum, dv_sum = self.sums
        dq = dq.to(dq_sum.dtype).unflatten(1, (group, -1)).transpose(0, 1)
        pieces_of(dq_sum[heads], at, tile.q_len, tile).add_(dq, alpha=self.scale)
        for total, part, alpha in ((dk_sum, dk, self.scale), (dv_sum, dv, 1.0)):
            pieces_of(total, tile.k_start, tile.k_len, tile).add_(part.to(total.dtype), alpha=alpha)

    def routed(self, rows: Tensor, block: slice) -> None:
        """Adds what ``rows [n]``, of ``G * T``, read of a block."""
        for some in rows.split(max(1, _SCORES // _MULTIPLE // (block.stop - block.start)) * _MULTIPLE):
            self._routed(some, block)

    def _routed(self, rows: Tensor, block: slice) -> None:
        product = torch.ops.mkldnn._linear_pointwise
        k, columns, v = (x[block] for x in self.read_keys)
        count, dim = len(rows), k.shape[1]
        q, dout = (gather(x, rows, -count % _MULTIPLE) for x in self.of_readers)
        q[count:, -3] = _NEVER
        weights = product(q, columns, None, "sigmoid", [], "")
        slopes = product.binary(dout, weights, v, None, "mul")
        dq_sum, dk_sum, dv_sum = self.sums
        add(dq_sum.flatten(0, 1), rows, (slopes @ k)[:count], self.scale)
        dk_sum[block].add_((slopes.mT @ q[:, :dim]).to(dk_sum.dtype), alpha=self.scale)
        dv_sum[block].add_((weights.mT @ dout[:, :dim]).to(dv_sum.dtype))


def _parts(x: Tensor, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of a narrow dtype whose sum is ``x``, but for the last one's rounding."""
    parts = [x.to(dtype)]
    for _ in range(count - 1):
        x = x - parts[-1].to(x.dtype)
        parts.append(x.to(dtype))
    return parts


def _row_sums(x: Tensor, y: Tensor) -> Tensor:
    """``sum_d x y`` of ``[..., D]`` in float32: ``[..., 1]``."""
    sums = torch.empty(*x.shape[:-1], 1)
    # A few rows at a time, so that wide copies stay in cache.
    for few_x, few_y, few in zip(*(each.flatten(0, -2).split(_ROWS) for each in (x, y, sums)), strict=True):
        torch.sum(few_x.float().mul_(few_y.float()), -1, keepdim=True, out=few)
    return sums
