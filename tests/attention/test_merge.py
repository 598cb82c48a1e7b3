"""Partial softmaxes merged against one softmax."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobazoo.attention.merge import merge, merge_parts

EMPTY = float("-inf")


def partial(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of a mask; zeros and -inf where there are none."""
    scores = (q @ k.mT).masked_fill(~mask, EMPTY)
    some = mask.any(-1, keepdim=True)
    weights = torch.where(some, scores, 0.0).softmax(-1) * some
    return weights @ v, torch.where(some[..., 0], torch.where(some, scores, 0.0).logsumexp(-1), EMPTY)


@pytest.fixture
def qkv() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 9, 9)]


@pytest.fixture
def split() -> Tensor:
    """Which of 3 parts holds each key [3, 5, 4, 9]; some parts are empty, and some queries read nothing."""
    part = torch.randint(0, 3, (5, 4, 9), generator=torch.Generator().manual_seed(1))
    part[0] = 0
    part[1] = 2
    masks = torch.stack([part == i for i in range(3)])
    masks[:, 2] = False
    return masks


def test_parts_merge_to_the_whole_with_the_same_gradients(qkv: list[Tensor], split: Tensor) -> None:
    want, want_lse = partial(*qkv, split.any(0))
    parts = [partial(*qkv, mask) for mask in split]
    pair = merge(*merge(*parts[0], *parts[1]), *parts[2])
    at_once = merge_parts(torch.stack([out for out, _ in parts], -2), torch.stack([lse for _, lse in parts], -1))
    weight = torch.randn_like(want)
    for out, lse in (pair, at_once):
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(lse, want_lse)
        real = split.any(0).any(-1)
        grads = torch.autograd.grad((out * weight).sum() + lse[real].sum(), qkv, retain_graph=True)
        wants = torch.autograd.grad((want * weight).sum() + want_lse[real].sum(), qkv, retain_graph=True)
        for grad, good in zip(grads, wants, strict=True):
            torch.testing.assert_close(grad, good)


def test_nothing_and_nothing_is_nothing_with_finite_gradients() -> None:
    out = torch.zeros(2, 3, requires_grad=True)
    lse = torch.full((2,), EMPTY, requires_grad=True)
    merged, merged_lse = merge(out, lse, out, lse)
    assert torch.equal(merged, torch.zeros(2, 3))
    assert torch.equal(merged_lse, torch.full((2,), EMPTY))
    grads = torch.autograd.grad(merged.sum(), (out, lse))
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_an_empty_side_changes_nothing_even_with_large_scores() -> None:
    out, lse = torch.randn(2, 3), torch.tensor([300.0, -300.0])
    junk = torch.full((2, 3), 7.0)
    merged, merged_lse = merge(out, lse, junk, torch.full((2,), EMPTY))
    assert torch.equal(merged, out)
    assert torch.equal(merged_lse, lse)


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    outs = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    lses = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merge_parts, (outs, lses))
    assert torch.autograd.gradcheck(merge, (outs[:, 0], lses[:, 0], outs[:, 1], lses[:, 1]))


def test_low_precision_parts_are_merged_in_float32() -> None:
    outs = torch.randn(4, 2, 8, dtype=torch.bfloat16)
    out, lse = merge_parts(outs, torch.randn(4, 2))
    assert out.dtype == lse.dtype == torch.float32
