"""Gradients in bfloat16 on a CPU by matrix products, for blocks of few keys.

With few keys a call, the flash kernel's backward is no faster in bfloat16 than in float32. Plain products are, on
processors that multiply bfloat16. Scores are float32, because theirs would be the rounding of an exponent. The other
four products sum in float32 what is bfloat16, and are rounded to it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import e, log2

import torch
from torch import Tensor

from mobazoo.attention.kernels.cpu_own import Tile, pieces_of, strip_mask

# Scores of one call; keys beyond which, and queries below which, the kernel is as fast.
_SCORES = 1 << 19
_MOST_KEYS = 256
_LEAST_QUERIES = 256
# Readers of a block are filled up to a multiple: oneDNN compiles a product for every size it meets.
_MULTIPLE = 64


def products_pay(dtype: torch.dtype, queries: int, keys: int) -> bool:
    """Whether products are faster than the kernel on this processor, for calls of so many queries and keys."""
    few, many = keys <= _MOST_KEYS, queries >= _LEAST_QUERIES
    return dtype == torch.bfloat16 and few and many and _multiplies_bfloat16()


@cache
def _multiplies_bfloat16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False  # and there is no operator to ask
    if torch.cpu._is_avx2_supported():  # oneDNN takes bfloat16 on any AVX-512, and widens it where it must
        return torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
        self.sums, self.scale = sums, scale
        # (dout, delta) . (v, -1): a weight's gradient less its row's mean, which would cancel digits if rounded before.
        delta = (dout.float() * out).sum(-1, keepdim=True)
        coarse = delta.to(dout.dtype)
        dout = torch.cat([dout, coarse, (delta - coarse).to(dout.dtype)], -1)
        # Powers of two cost less than powers of e.
        self.queries = q, dout, (lse * log2(e))[..., None]
        self.keys = k, k.float() * (scale * log2(e)), torch.cat([v, v.new_full((len(v), 2), -1.0)], -1)

    def own(self, tile: Tile, q_start: int) -> None:
        """Adds one tile of own-block work."""
        most = max(1, _SCORES // (tile.q_len * tile.k_len))  # pieces of a query head
        group = self.queries[0].shape[0]
        heads, step = min(group, most), max(1, most // group)
        for done in range(0, tile.count, step):
            on, count = done * tile.stride, min(step, tile.count - done)
            few = replace(tile, q_start=tile.q_start + on, k_start=tile.k_start + on, count=count)
            for head in range(0, group, heads):
                self._own(few, few.q_start - q_start, slice(head, head + heads))

    def _own(self, tile: Tile, at: int, heads: slice) -> None:
        q, dout, lse = (pieces_of(x[heads], at, tile.q_len, tile) for x in self.queries)
        group = len(q)
        q, dout, lse = (x.flatten(0, 1) for x in (q, dout, lse))
        if tile.causal:
            lse = lse - strip_mask(tile.q_len, tile.k_len, 1, lse.dtype)
        keys = (pieces_of(x, tile.k_start, tile.k_len, tile).repeat(group, 1, 1) for x in self.keys)
        dq, dk, dv = _gradients(q, dout, lse, *keys)
        dq_sum, dk_sum, dv_sum = self.sums
        pieces_of(dq_sum[heads], at, tile.q_len, tile).add_(dq.unflatten(0, (group, -1)), alpha=self.scale)
        for total, part, alpha in ((dk_sum, dk, self.scale), (dv_sum, dv, 1.0)):
            of_group = part.unflatten(0, (group, -1)).sum(0, dtype=total.dtype)
            pieces_of(total, tile.k_start, tile.k_len, tile).add_(of_group, alpha=alpha)

    def routed(self, rows: Tensor, block: slice) -> None:
        """Adds what ``rows [n]``, of ``G * T``, read of a block."""
        keys = [x[block] for x in self.keys]
        dq_sum, dk_sum, dv_sum = self.sums
        for some in rows.split(max(1, _SCORES // _MULTIPLE // (block.stop - block.start)) * _MULTIPLE):
            count = len(some)
            filled = torch.cat([some, some[:1].expand(-count % _MULTIPLE)])
            q, dout, lse = (x.flatten(0, 1).index_select(0, filled) for x in self.queries)
            lse[count:] = torch.inf  # who fills up weighs nothing
            dq, dk, dv = _gradients(q, dout, lse, *keys)
            dq_sum.flatten(0, 1).index_add_(0, some, dq[:count].to(dq_sum.dtype).mul_(self.scale))
            dk_sum[block].add_(dk, alpha=self.scale)
            dv_sum[block].add_(dv)


def _gradients(
    q: Tensor, dout: Tensor, lse: Tensor, k: Tensor, wide_k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``q`` and ``k`` without the scale, and of ``v``; all operands ``[..., n, D]`` as ``Products`` keeps them."""
    weights = (q.to(wide_k.dtype) @ wide_k.mT).sub_(lse).exp2_()
    slopes = (dout @ v.mT).to(weights.dtype).mul_(weights).to(q.dtype)
    return slopes @ k, slopes.mT @ q, weights.to(q.dtype).mT @ dout[..., : q.shape[-1]]
