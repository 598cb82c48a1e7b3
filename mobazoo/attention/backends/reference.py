"""Attention by a token mask: slow, plain, right. Any device and dtype, with autograd; memory grows as T x S."""

from __future__ import annotations

import torch
from torch import Tensor

from mobazoo.attention.problem import Problem
from mobazoo.attention.routing import Routes, query_slots
from mobazoo.attention.segments import Segments


def unsupported(problem: Problem) -> str | None:
    """Nothing: the reference computes every pattern everywhere."""
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
    """Softmax attention over the tokens of ``token_mask``; see ``attend`` for shapes."""
    batch, hq, length, _ = q.shape
    hkv = k.shape[1]
    compute = torch.promote_types(q.dtype, torch.float32)
    mask = token_mask(segments, routes, length, q_start)  # [B, Hq or 1, T, S]
    mask = mask.expand(batch, hq, -1, -1).unflatten(1, (hkv, hq // hkv))
    grouped = q.to(compute).unflatten(1, (hkv, hq // hkv))  # [B, Hkv, G, T, D]
    scores = torch.einsum("bjgtd,bjsd->bjgts", grouped, k.to(compute)) * scale
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    weights = weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # a query that reads nothing: zeros, not NaN
    out = torch.einsum("bjgts,bjsd->bjgtd", weights, v.to(compute))
    return out.flatten(1, 2).to(q.dtype)


def token_mask(segments: Segments, routes: Routes | None, length: int, q_start: int | Tensor) -> Tensor:
    """Which key each query reads: bool ``[B, Hq, T, S]`` for MoBA, ``[B, 1, T, S]`` for full attention."""
    slot = query_slots(segments, length, q_start)
    key = torch.arange(segments.length, device=slot.device)
    doc, pos = segments.doc[:, slot, None], segments.pos[:, slot, None]  # [B, T, 1]
    causal = (doc == segments.doc[:, None, :]) & (doc >= 0) & (key <= slot[:, None])  # [B, T, S]
    if routes is None:
        return causal[:, None]
    own = causal & (key >= slot[:, None] - pos % routes.block_size)
    mask = own[:, None].expand(-1, routes.index.shape[1], -1, -1).clone()
    if routes.start.shape[1] == 0:  # rows shorter than a block: there is nothing to choose from
        return mask
    for chosen in routes.index.long().unbind(-1):  # [B, Hq, T], one block a query
        start = routes.start[:, None, None, :].expand(*chosen.shape, -1).gather(3, chosen.clamp(min=0)[..., None])
        mask |= (chosen >= 0)[..., None] & (key >= start) & (key < start + routes.block_size)
    return mask
