"""Attention of few queries, as in decoding: every query reads its blocks where they lie in a cache.

Time follows the keys that are read and not the length of the cache. Many queries share blocks, which this does not use.
Full attention, also of MoBA whose blocks cover everything, is that of ``sdpa``, a group's heads folded into query rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobazoo.attention.backends import sdpa
from mobazoo.attention.kernels.decode import decode
from mobazoo.attention.problem import Problem
from mobazoo.attention.routing import Routes, query_slots
from mobazoo.attention.segments import Segments

# More queries than this read most blocks more than once.
FEW = 16


def unsupported(problem: Problem) -> str | None:
    """No backward; any device and floating dtype."""
    if problem.grad:
        return "decode has no backward"
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
    """Attention over ``routes``; see ``attend`` for shapes. ``k`` and ``v`` may lie on another device than ``q``."""
    if routes is None:
        return sdpa.run(q, k, v, segments=segments, routes=None, q_start=q_start, scale=scale)
    batch, hq, length, _ = q.shape
    slot = query_slots(segments, length, q_start)
    doc, pos = segments.doc[:, slot], segments.pos[:, slot]  # [B, T]
    own = torch.where(doc >= 0, slot - pos % routes.block_size, -1)[:, None, :, None].expand(batch, hq, -1, 1)
    if routes.start.shape[1] and routes.index.shape[3]:
        start = routes.start[:, None, None].expand(batch, hq, length, -1).long()
        index = routes.index.long()
        chosen = torch.where(index < 0, -1, start.gather(3, index.clamp(min=0)))
        own = torch.cat([chosen, own], dim=3)
    return decode(q, k, v, own, slot, routes.block_size, scale)
