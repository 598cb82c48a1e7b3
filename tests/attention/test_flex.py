"""Compiled FlexAttention against the reference on the same routes. Compilations are slow: configurations are shared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mobazoo.attention import Full, MoBA, Pattern, Routes, Segments, attend, centroids, route
from mobazoo.attention.backends import flex, flex_routed, reference
from mobazoo.attention.blockmask import block_mask
from mobazoo.attention.kernels import flex as kernel
from mobazoo.attention.problem import Problem
from mobazoo.errors import UnsupportedError

HQ, HKV, DIM = 4, 2, 16
SCALE = 0.3

CPU = Problem(MoBA(64, 3), "cpu", torch.float32, 64, grad=False, queries=256, slots=256)
needs_cpu_kernel = pytest.mark.skipif(kernel.unsupported(CPU) is not None, reason=str(kernel.unsupported(CPU)))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def rows(name: str) -> tuple[Segments, int, int | Tensor]:
    if name == "packed":
        return Segments.from_lengths([[130, 1, 0, 200], [256, 40]], length=340), 340, 0
    if name == "left padded":
        mask = torch.ones(2, 301, dtype=torch.int64)
        mask[1, :171] = 0
        return Segments.from_attention_mask(mask), 301, 0
    if name == "tiles":
        return Segments.single(2, 384), 384, 0
    if name == "shard":
        return Segments.from_lengths([[150, 150], [299]], length=300), 133, torch.tensor(100)
    if name == "one query":
        return Segments.from_lengths([[700], [100]], length=700), 1, 699
    raise KeyError(name)


def inputs(segments: Segments, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [(HQ, length), (HKV, segments.length), (HKV, segments.length)]
    return [torch.randn(segments.batch, h, n, DIM).to(dtype) for h, n in sizes]


def routes_of(q: Tensor, k: Tensor, pattern: MoBA, segments: Segments, q_start: int | Tensor) -> Routes:
    return route(q, centroids(k, pattern.block_size, segments), pattern, segments, q_start)


def error(out: Tensor, exact: Tensor) -> float:
    return (out.double() - exact).abs().max().item()


def check(case: str, pattern: Pattern, dtype: torch.dtype = torch.float32) -> None:
    """The error against float64 is at most twice the reference's own, or two units in the last place of 1."""
    segments, length, q_start = rows(case)
    q, k, v = inputs(segments, length, dtype)
    routes = routes_of(q, k, pattern, segments, q_start) if isinstance(pattern, MoBA) else None
    exact = reference.run(
        q.double(), k.double(), v.double(), segments=segments, routes=routes, q_start=q_start, scale=SCALE
    )
    own = error(reference.run(q, k, v, segments=segments, routes=routes, q_start=q_start, scale=SCALE), exact)
    out = flex.run(q, k, v, segments=segments, routes=routes, q_start=q_start, scale=SCALE)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert error(out, exact) <= max(2 * own, 2 * torch.finfo(dtype).eps)
    padding = (segments.doc < 0)[:, torch.arange(length) + q_start]
    assert not out.transpose(1, 2)[padding].any()


@needs_cpu_kernel
@pytest.mark.parametrize("case", ["packed", "left padded", "tiles", "shard"])
def test_routes_in_float32(case: str) -> None:
    for block_size in (1, 7, 64, 100, 128, 256):
        check(case, MoBA(block_size, 3))


@needs_cpu_kernel
@pytest.mark.parametrize("pattern", [Full(), MoBA(100, 1)])
def test_full_and_block_local(pattern: Pattern) -> None:
    check("packed", pattern)


@needs_cpu_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    check("packed", MoBA(64, 3), dtype)


def test_options_are_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another row of the table is another compilation."""
    segments = Segments.single(1, 128)
    keys: set[tuple[object, ...]] = set()
    q, k, v = inputs(segments, 128)
    mask = block_mask(None, segments, 128, 0, backward=False)
    monkeypatch.setattr(kernel, "_compiled", lambda _, key: keys.add(key) or (lambda *_: (q, None)))
    for options in (None, {"fwd_BLOCK_M": 64}, {"fwd_BLOCK_M": 128}, {"fwd_BLOCK_M": 64}):
        monkeypatch.setattr(kernel, "_options", lambda _, options=options: options)
        kernel.flex(q, k, v, mask, SCALE)
    assert len(keys) == 3


@needs_cpu_kernel
def test_one_query_and_a_padding_query() -> None:
    check("one query", MoBA(64, 3))


@needs_cpu_kernel
def test_a_wrong_tile_list_gives_a_wrong_answer() -> None:
    segments, length, q_start = rows("packed")
    q, k, v = inputs(segments, length)
    routes = routes_of(q, k, MoBA(64, 3), segments, q_start)
    want = reference.run(q, k, v, segments=segments, routes=routes, q_start=q_start, scale=SCALE)
    mask = block_mask(routes, segments, length, q_start, backward=False)
    assert error(kernel.flex(q, k, v, mask, SCALE)[0], want) < 1e-5
    mask.kv_num_blocks[:, :, -1] = 0
    assert error(kernel.flex(q, k, v, mask, SCALE)[0], want) > 0.1


@needs_cpu_kernel
def test_lengths_share_compilations() -> None:
    """One for T == S and one for T < S; sizes that happen to be equal at first (tiles and heads, say) cost another."""

    def compilations(lengths: range) -> int:
        for length in lengths:
            segments = Segments.single(2, length)
            for queries in (length, length - 129):
                q, k, v = inputs(segments, queries)
                attend(q, k, v, pattern=MoBA(64, 3), backend="flex", segments=segments)
        return int(counters["stats"]["unique_graphs"])

    before = compilations(range(900, 901))
    assert compilations(range(260, 700, 55)) == before


@needs_cpu_kernel
def test_more_variants_than_the_compiler_allows() -> None:
    """Every layout of the inputs is one."""
    segments, length, _ = rows("packed")
    q, k, v = inputs(segments, length)
    other = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    want = attend(q, k, v, pattern=MoBA(64, 3), backend="reference", segments=segments)
    with torch._dynamo.config.patch(recompile_limit=1):
        for given in ((q, k, v), other):
            assert error(attend(*given, pattern=MoBA(64, 3), backend="flex", segments=segments), want.double()) < 1e-5


@needs_cpu_kernel
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be reset")
def test_memory_does_not_grow_with_the_square() -> None:
    def kilobytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    segments = Segments.single(2, 4096)
    q, k, v = inputs(segments, 4096)
    attend(q, k, v, pattern=MoBA(256, 3), backend="flex")
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    attend(q, k, v, pattern=MoBA(256, 3), backend="flex")
    grown = kilobytes("VmHWM") - before
    assert grown < 2 * HQ * 4096 * 4096 / 2 / 1024  # half a token mask, an eighth of the scores


@needs_cpu_kernel
def test_leaves_under_no_grad() -> None:
    segments, length, _ = rows("packed")
    q, k, v = (x.requires_grad_() for x in inputs(segments, length))
    with torch.no_grad():
        out = attend(q, k, v, pattern=MoBA(64, 3), backend="flex", segments=segments)
    assert not out.requires_grad


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@needs_cpu_kernel
@pytest.mark.usefixtures("fresh_compiler")
def test_a_fullgraph_model_may_use_it() -> None:
    segments, length, _ = rows("packed")
    q, k, v = inputs(segments, length)

    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 1.5, k, v, pattern=MoBA(64, 3), backend="flex", segments=segments) + 1

    out = torch.compile(model, fullgraph=True)(q, k, v)
    want = attend(q * 1.5, k, v, pattern=MoBA(64, 3), backend="reference", segments=segments) + 1
    assert error(out, want.double()) < 1e-5


def test_a_cpu_with_gradients_is_refused_with_alternatives() -> None:
    q = torch.randn(1, 1, 64, 16, requires_grad=True)
    with pytest.raises(UnsupportedError, match=r"no backward on a CPU.*no_grad.*these can: .*reference"):
        attend(q, q, q, pattern=MoBA(16, 2), backend="flex")


def test_other_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(device: str = "cpu", dtype: torch.dtype = torch.float32, head_dim: int = 64) -> str:
        return str(flex.unsupported(Problem(MoBA(16, 2), device, dtype, head_dim, grad=False, queries=8, slots=8)))

    assert "not in torch.float64" in reason(dtype=torch.float64)
    assert "not for mps" in reason("mps")
    assert "head dim of 16 to 256 on CUDA, got 8" in reason("cuda", head_dim=8)
    kernel._missing.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert "'no-such-compiler' is not there; install it or set CXX" in reason()
    kernel._missing.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "needs AVX2" in reason()
    kernel._missing.cache_clear()


@needs_cpu_kernel
def test_an_inside_log_sum_exp_is_still_missing_on_a_cpu() -> None:
    """When this fails, ``flex_routed`` may be opened to CPUs."""
    segments = Segments.single(1, 256)
    q, k, v = inputs(segments, 256)
    with pytest.raises(Exception, match="return_lse"):
        kernel.flex(q, k, v, block_mask(None, segments, 256, 0, backward=False), SCALE, want_lse=True)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", [flex, flex_routed])
@pytest.mark.parametrize("case", ["packed", "left padded", "tiles", "shard"])
@pytest.mark.parametrize(("block_size", "top_k"), [(100, 1), (64, 3), (128, 2)])
def test_forward_and_backward_on_cuda(
    case: str, backend: object, dtype: torch.dtype, block_size: int, top_k: int
) -> None:
    segments, length, q_start = rows(case)
    segments = segments.to("cuda")
    q, k, v = (x.cuda().requires_grad_() for x in inputs(segments, length, dtype))
    q_start = q_start.cuda() if isinstance(q_start, Tensor) else q_start
    routes = routes_of(q, k, MoBA(block_size, top_k), segments, q_start)
    weight = torch.randn_like(q)

    def results(run: object, *tensors: Tensor) -> list[Tensor]:
        assert callable(run)
        out = run(*tensors, segments=segments, routes=routes, q_start=q_start, scale=SCALE)
        return [out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), tensors)]

    precise = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = results(reference.run, *precise)
    own = results(reference.run, q, k, v)
    got = results(backend.run, q, k, v)  # type: ignore[attr-defined]
    for x, mine, right in zip(got, own, exact, strict=True):
        unit = torch.finfo(dtype).eps * right.abs().max().item()
        assert error(x, right) <= max(3 * error(mine, right), 2 * unit)
