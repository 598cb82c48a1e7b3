"""Full and block attention by FlexAttention, masking tiles in place.

Every tile that some of its queries read is computed for all of them, so this pays where neighbouring queries choose
the same blocks (``blockmask.tile_density`` measures it); ``flex_routed`` does not depend on that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mobazoo.attention.blockmask import block_mask
from mobazoo.attention.kernels import flex as kernel
from mobazoo.attention.problem import Problem
from mobazoo.attention.routing import Routes
from mobazoo.attention.segments import Segments


def unsupported(problem: Problem) -> str | None:
    """CUDA with a backward, a CPU without; float32, float16 and bfloat16."""
    return kernel.unsupported(problem)


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
    """Attention over ``routes`` (None: the whole document); see ``attend`` for shapes."""
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    mask = block_mask(routes, segments, q.shape[2], q_start, backward=backward)
    return kernel.flex(q, k, v, mask, scale)[0]
