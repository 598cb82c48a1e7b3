"""Our Triton kernels beyond the common grid: dtypes, head dims, block sizes, slabs, graphs; interpreted on a CPU."""

from __future__ import annotations

from dataclasses import replace
from importlib import util

import pytest
import torch
from torch import Tensor

from mobazoo.attention import Full, MoBA, Pattern, Segments, attend, triton_runs
from mobazoo.attention.backends import triton
from mobazoo.attention.kernels import triton_slabs
from mobazoo.attention.problem import Problem
from tests.attention.cuda_graph import captured
from tests.factories import Case, inputs, oracle, random_routes, routes_on, run, segments_of
from tests.marks import TRITON_ON, able
from tests.tolerance import check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

PACKED = Case(((1, 50, -2, 17), (-9, 52, -9)), 16, 3, 4, 2, 64)
CASES = {
    "block 16": PACKED,
    "block 24": replace(PACKED, block_size=24),  # no power of two: keys of a tile are masked
    "block 7": replace(PACKED, block_size=7, top_k=4),  # smaller than any tile
    "block 70": Case(((150,),), 70, 2, 2, 1, 32),  # larger than a tile of keys
    "local": replace(PACKED, top_k=1),
    "full": PACKED.full,
    "head dim 96": replace(PACKED, dim=96),
    "head dim 20": replace(PACKED, dim=20),
    "groups of 3": replace(PACKED, hq=3, hkv=1),
    "groups of 8, a row of padding": Case(((40,), (-40,)), 16, 3, 8, 1, 32),
    "decode": replace(PACKED, hq=8, queries=1),
    "chunk": replace(PACKED, queries=23, first=40),
    "more keys than queries": Case(((-9, 70, -11),), 16, 3, 2, 2, 64, queries=12, first=3),
}


def verify(case: Case, dtype: torch.dtype, device: str) -> None:
    data = inputs(case, dtype, device)
    routes, chosen = random_routes(case) if case.block_size else (None, [])
    result, reference = (run(case, data, name, routes=routes, grad=True) for name in ("triton", "reference"))
    check(result, oracle(case, data, chosen), reference, "triton")
    assert all(x.dtype == dtype for x in result.tensors)


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name: str, device: str) -> None:
    verify(CASES[name], torch.float32, device)


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["block 16", "full"])
def test_in_16_bits(name: str, dtype: torch.dtype, device: str) -> None:
    verify(CASES[name], dtype, device)


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize("dim", [128, 256])
def test_wide_heads(dim: int, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        verify(Case(((40,),), 16, 2, 2, 1, dim), dtype, device)


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize("share", [1.0, 0.3], ids=["one pair", "few tokens"])
def test_slabs_change_nothing(share: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair of 70 tokens, 2 heads and 2 reads each at a time, or fewer tokens."""
    pair = 70 * 2 * 2 * (64 * 4 + triton_slabs._BYTES_PER_READ)
    monkeypatch.setattr(triton_slabs, "SLAB_BYTES", int(share * pair))
    verify(CASES["block 16"], torch.float32, device)


@pytest.mark.parametrize("device", TRITON_ON)
def test_slabs_without_routes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_slabs, "SLAB_BYTES", 9)
    verify(Case(((20,),), 16, 1, 2, 1, 16), torch.float32, device)


@pytest.mark.parametrize("device", TRITON_ON)
def test_popular_blocks(device: str) -> None:
    """Every query reads the first block: a list much longer than the others, and empty ones."""
    case = Case(((90,),), 16, 2, 2, 1, 32)
    data = inputs(case, device=device)
    routes, chosen = random_routes(case)
    index = torch.where(torch.arange(90)[:, None] >= 16, 0, -1).expand_as(routes.index).to(torch.int32)
    chosen = [[[{0} if t >= 16 else set() for t in range(90)] for _ in range(2)]]
    routes = replace(routes, index=index)
    result, reference = (run(case, data, name, routes=routes, grad=True) for name in ("triton", "reference"))
    check(result, oracle(case, data, chosen), reference, "triton")


@pytest.mark.parametrize("device", TRITON_ON)
def test_the_same_bits_every_time(device: str) -> None:
    case = Case(((60,),), 16, 3, 2, 1, 32)
    data = inputs(case, device=device)
    routes, _ = random_routes(case)
    first, second = (run(case, data, "triton", routes=routes, grad=True) for _ in range(2))
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", TRITON_ON)
def test_first_slot_may_be_a_number_on_the_device(device: str) -> None:
    """As in a CUDA graph, where a host integer would stay what it was."""
    case = replace(CASES["chunk"], queries=5)
    data, segments = inputs(case, device=device), segments_of(case.rows, device)
    routes = routes_on(random_routes(case)[0], device)
    fixed, free = (
        triton.run(*data.qkv, segments=segments, routes=routes, q_start=start, scale=0.125)
        for start in (40, torch.tensor(40, device=device))
    )
    assert torch.equal(fixed, free)


@pytest.mark.parametrize("sparse", [False, True])
def test_operator_is_what_it_says(sparse: bool) -> None:
    case = Case(((25, 15),), 16 if sparse else 0, 2, 2, 1, 16)
    if "triton" not in able(case, grad=True):
        pytest.skip("no interpreter beside a GPU")
    segments = segments_of(case.rows)
    routes = random_routes(case)[0] if sparse else None
    # [B, T, H, D] in memory, so that a fake which keeps strides shows
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs(case).qkv]
    table = (routes.index, routes.start) if routes else (None, None)
    bounds = (segments.max_docs, segments.max_len, segments.whole)
    torch.library.opcheck(
        torch.ops.mobazoo.triton.default,
        (*tensors, *table, segments.doc, segments.pos, 0, None, case.block_size, 0.25, *bounds, ""),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize("pattern", [Full(), MoBA(16, 2)], ids=str)
def test_compiles_whole(pattern: Pattern, device: str) -> None:
    def step(*tensors: Tensor) -> Tensor:
        return attend(*tensors, pattern=pattern, backend="triton").square().sum()

    results = []
    data = inputs(Case(((40,),), 16, 2, 2, 1, 16), device=device)
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.detach().requires_grad_() for x in data.qkv]
        loss = call(*leaves)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def problem(device: str = "cpu", dtype: torch.dtype = torch.float32, dim: int = 64) -> Problem:
    return Problem(MoBA(16, 2), device, dtype, dim, grad=True, queries=64, slots=64)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (problem("mps"), "not on mps"),
        (problem(dtype=torch.float64), "not in torch.float64"),
        (problem("cuda", dim=264), "head dims up to 256, got 264"),
    ],
    ids=["device", "dtype", "head dim"],
)
def test_says_why_not(asked: Problem, reason: str) -> None:
    assert reason in (triton.unsupported(asked) or "")


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "set TRITON_INTERPRET=1" in (triton.unsupported(problem()) or "")
    assert triton.unsupported(problem("cuda")) is None
    monkeypatch.setattr(util, "find_spec", lambda _: None)
    monkeypatch.setattr(triton_runs, "find_spec", lambda _: None)
    assert "pip install 'mobazoo[triton]'" in (triton.unsupported(problem("cuda")) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pattern", [Full(), MoBA(64, 3)], ids=str)
def test_never_waits(pattern: Pattern, request: pytest.FixtureRequest) -> None:
    segments = Segments.from_lengths([[700, 1, 300], [1001]], device="cuda")
    q = torch.randn(2, 8, 1001, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(2, 2, 1001, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    attend(q, k, v, pattern=pattern, segments=segments, backend="triton").sum().backward()  # compiles, which may wait
    start = torch.tensor(17, device="cuda")
    dout = torch.randn_like(q)
    request.getfixturevalue("waiting_is_an_error")
    attend(q, k, v, pattern=pattern, segments=segments, backend="triton").backward(dout)
    attend(q[:, :, :5], k, v, pattern=pattern, segments=segments, backend="triton", q_start=start)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_decoding_in_a_cuda_graph() -> None:
    q = torch.randn(3, 8, 1, 64, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 3, 2, 1001, 64, device="cuda", dtype=torch.bfloat16)
    start = torch.tensor(500, device="cuda")

    def step() -> tuple[Tensor, ...]:
        return (attend(q, k, v, pattern=MoBA(64, 3), backend="triton", q_start=start),)

    graph, (out,) = captured(step)
    for slot in (500, 777):
        start.fill_(slot)
        graph.replay()
        assert torch.equal(out, *step())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pattern", [Full(), MoBA(64, 3)], ids=str)
def test_training_in_a_cuda_graph(pattern: Pattern) -> None:
    """Gate, forward and backward, on packed rows; then with other numbers in the same places."""
    segments = Segments.from_lengths([[700, 1, 300], [900]], length=1001, device="cuda")
    shapes = ((2, 8, 1001, 64), (2, 2, 1001, 64), (2, 2, 1001, 64))
    q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes)
    dout = torch.randn_like(q)

    def step() -> tuple[Tensor, ...]:
        out = attend(q, k, v, pattern=pattern, segments=segments, backend="triton")
        return out, *torch.autograd.grad(out, (q, k, v), dout)

    graph, results = captured(step)
    for _ in range(2):
        with torch.no_grad():
            for x in (q, k, v):
                x.normal_()
        graph.replay()
        for got, want in zip(results, step(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pattern", [Full(), MoBA(64, 3)], ids=str)
def test_compiles_whole_to_code(pattern: Pattern) -> None:
    q, k, v = (torch.randn(2, heads, 500, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2))

    def step() -> Tensor:
        return attend(q, k, v, pattern=pattern, backend="triton").square().sum()

    results = [torch.autograd.grad(call(), (q, k, v)) for call in (step, torch.compile(step, fullgraph=True))]
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
