"""Full attention by ``torch.nn.functional.scaled_dot_product_attention``, without repeating keys or a T x S mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from mobazoo.attention.pattern import MoBA
from mobazoo.attention.problem import Problem
from mobazoo.attention.routing import Routes, query_slots
from mobazoo.attention.segments import Segments

# The mask of a chunk of queries, in entries; SDPA widens each to the query's dtype.
_MASK_ENTRIES = 16 << 20


def unsupported(problem: Problem) -> str | None:
    """Full attention on any device; it has no way to skip blocks."""
    if isinstance(problem.pattern, MoBA):
        return "sdpa computes full attention only; use flash, flex or reference for MoBA"
    return None


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
    """Causal attention inside documents; see ``attend`` for shapes."""
    length, slots = q.shape[2], k.shape[2]
    if segments.whole and length == slots:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    step = max(1, _MASK_ENTRIES // max(1, q.shape[0] * slots))
    count = -(-length // step)  # a graph is compiled for each count, not for each length
    chunks = []
    for n in range(count):
        chunk = q if count == 1 else q[:, :, n * step : (n + 1) * step]
        first = q_start + n * step
        # Keys after the chunk's last query are hidden from all of it.
        end = slots if isinstance(first, Tensor) else first + chunk.shape[2]
        args = (chunk, k[:, :, :end], v[:, :, :end], segments, first, scale)
        # Kept for a backward, the chunks' masks would be T x S after all. A compiler decides that for itself.
        again = count > 1 and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        chunks.append(checkpoint(_masked, *args, use_reentrant=False) if again else _masked(*args))
    return torch.cat(chunks, dim=2)


def _masked(q: Tensor, k: Tensor, v: Tensor, segments: Segments, q_start: int | Tensor, scale: float) -> Tensor:
    """A group's heads folded into query rows, which all read the same keys."""
    hkv, group, length = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    folded = q.unflatten(1, (hkv, group)).flatten(2, 3)  # [B, Hkv, G * T, D]
    if segments.whole and length == 1 and isinstance(q_start, int):  # decode: every key is visible
        out = scaled_dot_product_attention(folded, k, v, scale=scale)
        return out.unflatten(2, (group, length)).flatten(1, 2)
    slot = query_slots(segments, length, q_start)
    key = torch.arange(k.shape[2], device=k.device)
    doc = segments.doc[:, slot, None]  # [B, T, 1]
    mask = (doc == segments.doc[:, None, : k.shape[2]]) & (key <= slot[:, None])
    mask &= doc >= 0
    folded_mask = mask[:, None].expand(-1, group, -1, -1).flatten(1, 2)[:, None]  # [B, 1, G * T, S]
    out = scaled_dot_product_attention(folded, k, v, attn_mask=folded_mask, scale=scale)
    out = out.unflatten(2, (group, length)).flatten(1, 2)
    return torch.where(mask.any(-1)[:, None, :, None], out, 0.0)  # padding rows: zeros, not NaN
