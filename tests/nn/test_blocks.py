"""Norm and feed-forward against their formulas."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from mobazoo.nn.mlp import SwiGLU
from mobazoo.nn.norm import RMSNorm


def test_norm() -> None:
    norm = RMSNorm(8, eps=1e-3)
    assert torch.equal(norm.weight, torch.ones(8))
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 8)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), want)
    low = norm.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert not norm.bfloat16()(torch.full((1, 8), 1e30, dtype=torch.bfloat16)).isnan().any()


def test_feed_forward() -> None:
    for bias in (False, True):
        mlp = SwiGLU(8, 12, bias)
        x = torch.randn(3, 8)
        torch.testing.assert_close(mlp(x), mlp.down_proj(silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
        assert len(list(mlp.parameters())) == 3 * (1 + bias)
