"""Who computes centroids and the gate's choice: torch's operators, or our Triton kernels. Both choose the same."""

from __future__ import annotations

import torch
from torch import Tensor

from mobazoo.attention.pattern import Full, Pattern
from mobazoo.attention.triton_runs import refuses_gate
from mobazoo.errors import InputError, UnsupportedError

TORCH, TRITON = "torch", "triton"


def gate_of(backend: str, q: Tensor, pattern: Pattern) -> str:
    """Who computes the gate for queries ``q`` that ``backend`` serves.

    The Triton kernels belong to the backend of that name, as far as they can: which gate is faster on a GPU nobody has
    measured, so every other backend keeps torch's.
    """
    if backend != TRITON or isinstance(pattern, Full):
        return TORCH
    return TORCH if refuses_gate(q.device.type, q.dtype, q.shape[3], pattern.top_k - 1) else TRITON


def check_by(what: str, by: str, device: torch.device, dtype: torch.dtype, head_dim: int, reads: int = 0) -> None:
    """Raises where ``by`` is nobody, or cannot compute this."""
    if by not in (TORCH, TRITON):
        raise InputError(f"{what}: by must be {TORCH!r} or {TRITON!r}, got {by!r}")
    why = refuses_gate(device.type, dtype, head_dim, reads) if by == TRITON else None
    if why:
        raise UnsupportedError(f"{what}: by={TRITON!r} cannot do this: {why}; by={TORCH!r} can")
