"""Full and block attention by flash kernels: an own-block pass and a routed pass, merged by log-sum-exp.

One opaque operator each way, so that a fullgraph model may use it; the schedule and the kernel are chosen by device.
"""

from __future__ import annotations

from torch import Tensor

from mobazoo.attention.kernels import cpu, providers, varlen
from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.kernels.operators import operator
from mobazoo.attention.problem import Problem
from mobazoo.attention.routing import Routes
from mobazoo.attention.segments import Segments


def unsupported(problem: Problem) -> str | None:
    """A CPU in any floating dtype; CUDA in float16 and bfloat16 with head dims up to 256."""
    if problem.device == "cpu":
        return None
    return providers.unsupported(problem.device, problem.dtype, problem.head_dim)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segments: Segments,
    routes: Routes | None,
    q_start: int | Tensor,
    scale: float,
    provider: str = providers.AUTO,
) -> Tensor:
    """Attention over ``routes`` (None: the whole document); see ``attend`` for shapes.

    ``provider`` names a CUDA kernel for tests and benchmarks, see ``kernels.providers``; a CPU has one.
    """
    return _flash(q, k, v, segments, routes, q_start, scale, provider)


def _forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, provider: str) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return cpu.forward(q, k, v, layout, scale)
    return varlen.forward(q, k, v, layout, scale, providers.get(provider, q.device.type, q.dtype, q.shape[3]))


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float, provider: str
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return cpu.backward(dout, q, k, v, out, lse, layout, scale)
    kernel = providers.get(provider, q.device.type, q.dtype, q.shape[3])
    return varlen.backward(dout, q, k, v, out, lse, layout, scale, kernel)


_flash = operator("flash", _forward, _backward)
