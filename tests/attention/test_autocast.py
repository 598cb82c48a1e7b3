"""Autocast does not reach into attention."""

import pytest
import torch

from mobazoo.attention import Full, MoBA, Pattern, attend


@pytest.mark.parametrize("pattern", [Full(), MoBA(8, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(pattern: Pattern, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 77, 16).to(dtype).requires_grad_()
    k, v = (torch.randn(2, 2, 77, 16).to(dtype).requires_grad_() for _ in range(2))
    plain = attend(q, k, v, pattern=pattern)
    with torch.autocast("cpu", torch.bfloat16):
        other = attend(q, k, v, pattern=pattern)
    assert torch.equal(plain, other)
    for one, two in zip(*(torch.autograd.grad(out.float().sum(), (q, k, v)) for out in (plain, other)), strict=True):
        assert torch.equal(one, two)
