"""The flash backend on a GPU, each kernel provider against the float64 reference with the same routes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobazoo.attention import Full, MoBA, Pattern, Routes, Segments, attend, centroids, route
from mobazoo.attention.backends import flash, reference
from mobazoo.attention.kernels import providers, slabs
from tests.attention.cuda_graph import captured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ROWS = [[700, 1, 300], [1001], [512, 400]]  # packed, whole, padded
PATTERNS = [Full(), MoBA(64, 1), MoBA(64, 3), MoBA(100, 4)]
# Probabilities, their gradients, each kernel's result and the merged one are rounded to the dtype: four roundings of
# half a unit each, relative to the norm of the whole tensor. The sums between are float32.
ROUNDINGS = 4


@pytest.fixture(params=providers.NAMES)
def provider(request: pytest.FixtureRequest) -> str:
    reason = providers.absent(request.param)
    if reason is not None:
        pytest.skip(reason)
    return request.param


def inputs(
    dtype: torch.dtype, heads: tuple[int, int] = (8, 2), dim: int = 64, queries: int = 1001, grad: bool = False
) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(3, queries, heads[0], dim), (3, 1001, heads[1], dim), (3, 1001, heads[1], dim)]
    return [torch.randn(s, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_(grad) for s in shapes]


def routes_of(q: Tensor, k: Tensor, pattern: Pattern, segments: Segments) -> Routes | None:
    if isinstance(pattern, Full):
        return None
    return route(q.detach(), centroids(k.detach(), pattern.block_size, segments), pattern, segments)


def close(got: Tensor, want: Tensor) -> None:
    budget = ROUNDINGS * torch.finfo(got.dtype).eps / 2
    assert (got.double() - want).norm() <= budget * want.norm()


def check(provider: str, tensors: list[Tensor], pattern: Pattern, segments: Segments) -> None:
    q, k, v = tensors
    routes = routes_of(q, k, pattern, segments)
    first = k.shape[2] - q.shape[2]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    want = reference.run(*exact, segments=segments, routes=routes, q_start=first, scale=0.125)
    out = flash.run(q, k, v, segments=segments, routes=routes, q_start=first, scale=0.125, provider=provider)
    close(out, want)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(want, exact, dout.double())
    for got, expected in zip(torch.autograd.grad(out, tensors, dout), wanted, strict=True):
        close(got, expected)
    padding = (segments.doc[:, first:] < 0)[:, None].expand(out.shape[:3])
    assert (out[padding] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_against_float64(provider: str, dtype: torch.dtype, pattern: Pattern) -> None:
    segments = Segments.from_lengths(ROWS, device="cuda")
    check(provider, inputs(dtype, grad=True), pattern, segments)
    check(provider, inputs(dtype, grad=True), pattern, Segments.single(3, 1001, "cuda"))


@pytest.mark.parametrize("heads", [(2, 2), (8, 1)])
@pytest.mark.parametrize("dim", [20, 128, 256])
@pytest.mark.parametrize("queries", [1, 130])
def test_shapes(provider: str, heads: tuple[int, int], dim: int, queries: int) -> None:
    segments = Segments.from_lengths(ROWS, device="cuda")
    for pattern in PATTERNS:
        check(provider, inputs(torch.bfloat16, heads, dim, queries, grad=True), pattern, segments)


def test_slabs(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 1 << 20)
    segments = Segments.from_lengths(ROWS, device="cuda")
    check(provider, inputs(torch.bfloat16, grad=True), MoBA(64, 3), segments)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_never_waits(pattern: Pattern, request: pytest.FixtureRequest) -> None:
    segments = Segments.from_lengths(ROWS, device="cuda")
    tensors, dout = inputs(torch.bfloat16, grad=True), torch.randn(3, 8, 1001, 64, device="cuda", dtype=torch.bfloat16)
    start = torch.tensor(17, device="cuda")
    request.getfixturevalue("waiting_is_an_error")
    attend(*tensors, pattern=pattern, segments=segments, backend="flash").backward(dout)
    q, k, v = tensors
    attend(q[:, :, :5], k, v, pattern=pattern, segments=segments, backend="flash", q_start=start)


def test_decoding_in_a_cuda_graph() -> None:
    segments = Segments.single(3, 1001, "cuda")
    q, k, v = inputs(torch.bfloat16, queries=1)
    start = torch.tensor(500, device="cuda")

    def step() -> tuple[Tensor, ...]:
        return (attend(q, k, v, pattern=MoBA(64, 3), segments=segments, backend="flash", q_start=start),)

    graph, (out,) = captured(step)
    for slot in (500, 777):
        start.fill_(slot)
        graph.replay()
        assert torch.equal(out, *step())


@pytest.mark.parametrize("pattern", [Full(), MoBA(64, 3)], ids=str)
def test_compiles_whole(pattern: Pattern) -> None:
    segments = Segments.from_lengths(ROWS, device="cuda")

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, pattern=pattern, segments=segments, backend="flash").float().square().sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True)):
        leaves = inputs(torch.bfloat16, grad=True)
        results.append(torch.autograd.grad(run(*leaves), leaves))
    for eager, compiled in zip(*results, strict=True):
        close(compiled, eager.double())
