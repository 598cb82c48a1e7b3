"""The flash backend's operators: what a compiler is told about them is true."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobazoo.attention import Full, MoBA, Pattern, Segments, attend
from mobazoo.attention.backends import flash
from mobazoo.attention.problem import Problem

PATTERNS = [Full(), MoBA(block_size=8, top_k=2)]


def inputs(*, grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 4, 40, 16), (2, 2, 40, 16), (2, 2, 40, 16)]
    # [B, T, H, D] in memory, so that a fake which keeps strides shows
    return [torch.randn(b, t, h, d).transpose(1, 2).requires_grad_(grad) for b, h, t, d in shapes]


@pytest.mark.parametrize("sparse", [False, True])
def test_operator_is_what_it_says(sparse: bool) -> None:
    segments = Segments.from_lengths([[25, 15], [30]])
    index = torch.full((2, 4, 40, 1), -1, dtype=torch.int16)
    index[0, :, 20:25] = 0
    routes = (index, torch.tensor([[0, 8, 16, 25, -1]] * 2, dtype=torch.int32)) if sparse else (None, None)
    bounds = (segments.max_docs, segments.max_len, segments.whole)
    torch.library.opcheck(
        torch.ops.mobazoo.flash.default,
        (*inputs(grad=True), *routes, segments.doc, segments.pos, 0, None, 8 if sparse else 0, 0.25, *bounds, "auto"),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_compiles_whole(pattern: Pattern) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, pattern=pattern, backend="flash").square().sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = inputs(grad=True)
        loss = run(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [("xpu", torch.bfloat16, "no kernel for xpu"), ("cuda", torch.float32, "float16 and bfloat16 only")],
)
def test_says_why_not(device: str, dtype: torch.dtype, reason: str) -> None:
    problem = Problem(Full(), device, dtype, head_dim=64, grad=False, queries=8, slots=8)
    assert reason in (flash.unsupported(problem) or "")
