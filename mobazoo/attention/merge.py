"""Merging partial softmaxes: attention over a union of key sets from attention over each set."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint key sets together.

    Differentiable in all four arguments: the gradient of a log-sum-exp is part of the gradient of the merged output,
    so whatever made ``lse_a`` and ``lse_b`` must pass it on.

    Args:
        out_a: ``[..., D]``, softmax-weighted values over the first set; finite, whatever its log-sum-exp.
        lse_a: ``[...]``, natural log-sum-exp of its scaled scores; ``-inf`` where the set is empty.
        out_b: ``[..., D]``, the same over the second set.
        lse_b: ``[...]``.

    Returns:
        The merged output ``[..., D]`` and log-sum-exp ``[...]``, at least float32. Where both sets are empty the
        output is zero and the log-sum-exp ``-inf``.
    """
    wide = torch.promote_types(out_a.dtype, torch.float32)
    top = _finite(torch.maximum(lse_a, lse_b).detach())
    weight_a, weight_b = torch.exp(lse_a.to(wide) - top), torch.exp(lse_b.to(wide) - top)
    total = weight_a + weight_b
    safe = torch.where(total == 0, 1.0, total)
    out = out_a.to(wide) * (weight_a / safe)[..., None] + out_b.to(wide) * (weight_b / safe)[..., None]
    return out, torch.where(total == 0, float("-inf"), top + safe.log())


def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """``merge`` over any number of disjoint key sets: outputs ``[..., P, D]``, log-sum-exps ``[..., P]``."""
    wide = torch.promote_types(outs.dtype, torch.float32)
    top = _finite(lses.detach().amax(-1, keepdim=True))
    weights = torch.exp(lses.to(wide) - top)  # [..., P]
    total = weights.sum(-1)
    safe = torch.where(total == 0, 1.0, total)
    out = torch.einsum("...p,...pd->...d", weights / safe[..., None], outs.to(wide))
    return out, torch.where(total == 0, float("-inf"), top[..., 0] + safe.log())


def _finite(top: Tensor) -> Tensor:
    """The shift that keeps exponentials in range; 0 where every set is empty, since ``-inf - -inf`` is NaN."""
    return torch.where(top == float("-inf"), 0.0, top)
