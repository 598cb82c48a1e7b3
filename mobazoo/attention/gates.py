"""Who computes centroids and the gate's choice: torch's operators, or our Triton kernels. Both choose the same."""

from __future__ import annotations

import torch

from mobazoo.attention.pattern import MoBA
from mobazoo.attention.problem import Problem
from mobazoo.attention.triton_runs import refuses_gate
from mobazoo.errors import InputError, UnsupportedError

TORCH, TRITON = "torch", "triton"


def gate_of(backend: str, problem: Problem) -> str:
    """Who computes the gate where ``attend`` was not given routes.

    The Triton kernels belong to the backend of that name, as far as they can: which gate is faster on a GPU nobody has
    measured, so every other backend keeps torch's.
    """
    if backend != TRITON or not isinstance(problem.pattern, MoBA):
        return TORCH
    why = refuses_gate(problem.device, problem.dtype, problem.head_dim, problem.pattern.top_k - 1)
    return TORCH if why else TRITON


def check_by(what: str, by: str, device: torch.device, dtype: torch.dtype, head_dim: int, reads: int = 0) -> None:
    """Raises where ``by`` is nobody, or cannot compute this."""
    if by not in (TORCH, TRITON):
        raise InputError(f"{what}: by must be {TORCH!r} or {TRITON!r}, got {by!r}")
    why = refuses_gate(device.type, dtype, head_dim, reads) if by == TRITON else None
    if why:
        raise UnsupportedError(f"{what}: by={TRITON!r} cannot do this: {why}; by={TORCH!r} can")
