"""``attend``: the one way into attention."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from mobazoo.attention.auto import choose
from mobazoo.attention.backends import BACKENDS
from mobazoo.attention.blocks import centroids_by
from mobazoo.attention.checks import check_routes, check_tensors, segments_for
from mobazoo.attention.gates import gate_of
from mobazoo.attention.pattern import Full, MoBA, Pattern
from mobazoo.attention.problem import Problem
from mobazoo.attention.routing import Routes, route_by
from mobazoo.attention.segments import Segments, first_slot
from mobazoo.errors import InputError, UnsupportedError

log = logging.getLogger("mobazoo.attention")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pattern: Pattern = Full(),
    backend: str = "auto",
    segments: Segments | None = None,
    routes: Routes | None = None,
    q_start: int | Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of ``q`` over ``k`` and ``v``, full or by blocks (arXiv 2502.13189, section 2).

    Args:
        q: ``[B, Hq, T, D]`` queries at row slots ``q_start .. q_start + T - 1``, after RoPE.
        k: ``[B, Hkv, S, D]`` keys; ``Hq`` is a multiple of ``Hkv`` and heads of a group share a key head.
        v: ``[B, Hkv, S, D]`` values.
        pattern: what to compute, ``Full()`` or ``MoBA(block_size, top_k)``.
        backend: which code computes it: ``auto``, or a name that never falls back to another.
        segments: documents packed in the ``S`` slots (None: every row is one document).
        routes: which blocks each query reads (None: ``route(q, centroids(k, ...), ...)``). MoBA only.
        q_start: slot of the first query, an int or a 0-dim integer tensor, the same for all rows (None: ``S - T``).
        scale: of the scores before softmax (None: ``D ** -0.5``).

    Returns:
        ``[B, Hq, T, D]`` in the dtype of ``q``; rows of padding are zeros.

    Raises:
        InputError: shapes, dtypes or values that do not fit together.
        UnsupportedError: a named backend that cannot do this, with the reason and what can.

    Example:
        >>> q = torch.randn(1, 4, 96, 32)
        >>> k, v = torch.randn(2, 1, 2, 96, 32)
        >>> attend(q, k, v, pattern=MoBA(block_size=16, top_k=3)).shape
        torch.Size([1, 4, 96, 32])
    """
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        # Autocast would round the gate's float32 scores and cast inside kernels that keep their own books.
        with torch.autocast(q.device.type, enabled=False):
            return attend(
                q,
                k,
                v,
                pattern=pattern,
                backend=backend,
                segments=segments,
                routes=routes,
                q_start=q_start,
                scale=scale,
            )
    check_tensors(q, k, v)
    segments = segments_for(k, segments)
    first = first_slot("attend", q.shape[2], k.shape[2], q_start)
    check_routes(q, pattern, segments, routes)
    if routes is None and isinstance(pattern, MoBA):
        pattern = _without_waste(pattern, segments)
    problem = Problem(
        pattern=pattern,
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[3],
        grad=torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        queries=q.shape[2],
        slots=k.shape[2],
        whole=segments.whole,
    )
    name = _named(backend, problem)
    if 0 in q.shape:
        return q.clone()  # nothing to compute, but a backward may follow
    if isinstance(pattern, MoBA) and routes is None:
        by = gate_of(name, q, pattern)
        known = centroids_by(by, k.detach(), pattern.block_size, segments)
        routes = route_by(by, q.detach(), known, pattern, segments, first)
    return BACKENDS[name].run(
        q,
        k,
        v,
        segments=segments,
        routes=routes,
        q_start=first,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
    )


def _without_waste(pattern: MoBA, segments: Segments) -> Pattern:
    """The same computation without blocks that cannot exist: full attention where every document is read whole."""
    if pattern.covers(segments.max_len):
        return Full()
    return MoBA(pattern.block_size, min(pattern.top_k, segments.length // pattern.block_size + 1))


def _named(backend: str, problem: Problem) -> str:
    """The backend to use: ``auto`` chooses, a name is taken or refused."""
    if backend == "auto":
        name, why = choose(problem)
        # In a graph a pattern's numbers may be symbols, which have no text.
        pattern = "a compiled graph" if torch.compiler.is_compiling() else str(problem.pattern)
        _log_once(f"backend auto: {name} for {pattern} on {problem.device} {problem.dtype}: {why}")
        return name
    if backend not in BACKENDS:
        raise InputError(f"attend: unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[backend].unsupported(problem)
    if reason is not None:
        others = [name for name, other in BACKENDS.items() if other.unsupported(problem) is None]
        raise UnsupportedError(f"attend: backend {backend!r} cannot do this: {reason} (these can: {', '.join(others)})")
    return backend


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # said while a graph is made
def _log_once(message: str) -> None:
    _said(message)


@cache
def _said(message: str) -> None:
    log.info(message)
