"""What ``attend`` refuses before any kernel runs: what, what was given, and what to do, on one line."""

from __future__ import annotations

import torch
from torch import Tensor

from mobazoo.attention.pattern import Full, MoBA, Pattern
from mobazoo.attention.routing import Routes
from mobazoo.attention.segments import Segments
from mobazoo.errors import InputError

_NUMBERS = (torch.int16, torch.int32, torch.int64)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices of q, k and v."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise InputError(
            "attend: want q [B, Hq, T, D] and k, v [B, Hkv, S, D], "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise InputError(f"attend: query heads must be a multiple of key heads, got Hq={q.shape[1]}, Hkv={k.shape[1]}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise InputError(
            f"attend: q, k, v must share a floating dtype of 16, 32 or 64 bits, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise InputError(f"attend: q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")


def segments_for(k: Tensor, segments: Segments | None) -> Segments:
    """The documents of ``k``'s slots: those given, if they fit, or one in each row."""
    if segments is None:
        return Segments.single(k.shape[0], k.shape[2], k.device)
    if (segments.batch, segments.length) != (k.shape[0], k.shape[2]):
        raise InputError(
            f"attend: segments are for [B={segments.batch}, S={segments.length}], "
            f"k has B={k.shape[0]}, S={k.shape[2]}; build them for the keys"
        )
    if segments.doc.device != k.device:
        raise InputError(f"attend: segments are on {segments.doc.device}, k on {k.device}; use segments.to({k.device})")
    return segments


def check_routes(q: Tensor, pattern: Pattern, segments: Segments, routes: Routes | None) -> None:
    """The pattern, and routes if there are any."""
    if not isinstance(pattern, Full | MoBA):
        raise InputError(f"attend: pattern must be Full() or MoBA(block_size, top_k), got {pattern!r}")
    if routes is None:
        return
    if isinstance(pattern, Full):
        raise InputError("attend: routes were given but the pattern is Full(); pass the MoBA they were made for")
    index, start = routes.index, routes.start
    want = [*q.shape[:3], pattern.top_k - 1]
    if routes.block_size != pattern.block_size or list(index.shape) != want:
        raise InputError(
            f"attend: routes have block_size={routes.block_size} and index {list(index.shape)}, "
            f"want block_size={pattern.block_size} and [B, Hq, T, top_k - 1] = {want}"
        )
    if (
        start.dim() != 2
        or start.shape[0] != segments.batch
        or start.dtype != torch.int32
        or index.dtype not in _NUMBERS
    ):
        raise InputError(
            "attend: routes must have start [B, N] int32 and index of integers, "
            f"got start {list(start.shape)} {start.dtype} for B={segments.batch}, and index {index.dtype}"
        )
    if not index.device == start.device == q.device:
        raise InputError(f"attend: routes are on {index.device} and {start.device}, q on {q.device}")
