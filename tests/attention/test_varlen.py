"""The GPU schedule, run on a CPU with a stub kernel, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mobazoo.attention import MoBA, Routes, Segments, centroids, route
from mobazoo.attention.backends import reference
from mobazoo.attention.kernels import slabs, varlen
from mobazoo.attention.kernels.fit import Fitted, Provider
from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.kernels.providers import Aten
from tests.attention.varlen_stub import Stub

SLOTS = 96
ROWS = {
    "whole": ((96,), (96,)),
    "tail": ((50, 46), (95, 1)),
    "packed": ((40, 1, 30, 1, 1, 23), (1, 94, 1), (64, 32)),
    "padded": ((-5, 40, -3, 30, -18), (96,), (-96,), (90, -6), (-6, 90)),
    "empty": ((-96,), (-96,)),
}
HEADS = ((2, 2), (4, 2), (8, 1))


@dataclass(frozen=True)
class Case:
    """One problem; a negative length is padding, ``block_size`` 0 is full attention, ``first`` None the last slots."""

    rows: str = "packed"
    heads: tuple[int, int] = (4, 2)
    block_size: int = 7
    top_k: int = 3
    queries: int = SLOTS
    first: int | None = None
    tensor: bool = False
    strides: str = "heads"
    dim: int = 8

    @property
    def q_start(self) -> int | Tensor:
        first = SLOTS - self.queries if self.first is None else self.first
        return torch.tensor(first) if self.tensor else first


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of small operations: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def segments_of(name: str) -> Segments:
    doc, pos = (torch.full((len(ROWS[name]), SLOTS), fill, dtype=torch.int32) for fill in (-1, 0))
    for b, row in enumerate(ROWS[name]):
        slot = 0
        for number, length in enumerate(row):
            if length > 0:
                doc[b, slot : slot + length] = number
                pos[b, slot : slot + length] = torch.arange(length)
            slot += abs(length)
    real = [[n for n in row if n > 0] for row in ROWS[name]]
    longest = max((n for row in real for n in row), default=0)
    return Segments(doc, pos, max(map(len, real)), longest, whole=all(row == (SLOTS,) for row in ROWS[name]))


def tensors_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``q, k, v, dout`` in float64; values are the same whatever the strides."""
    torch.manual_seed(0)
    batch, (hq, hkv) = len(ROWS[case.rows]), case.heads
    shapes = [(batch, h, t, case.dim) for h, t in ((hq, case.queries), (hkv, SLOTS), (hkv, SLOTS), (hq, case.queries))]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if case.strides == "tokens":  # [B, S, H, D] in memory, as projections leave it
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    if case.strides == "cache":  # a view of longer keys
        tensors[1:3] = [torch.nn.functional.pad(x, (0, 0, 0, 9))[:, :, :SLOTS] for x in tensors[1:3]]
    q, k, v, dout = tensors
    return q, k, v, dout


def routes_of(case: Case, q: Tensor, k: Tensor, segments: Segments) -> Routes | None:
    if not case.block_size:
        return None
    known = centroids(k, case.block_size, segments)
    return route(q, known, MoBA(case.block_size, case.top_k), segments, case.q_start)


def check(case: Case, provider: Provider | None = None, segments: Segments | None = None) -> None:
    q, k, v, dout = tensors_of(case)
    segments = segments or segments_of(case.rows)
    routes = routes_of(case, q, k, segments)
    layout, scale = Layout.of(segments, routes, case.q_start), 0.3
    provider = provider or Stub()

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    want = reference.run(*leaves, segments=segments, routes=routes, q_start=case.q_start, scale=scale)
    want_grads = torch.autograd.grad(want, leaves, dout)

    out, lse = varlen.forward(q, k, v, layout, scale, provider)
    grads = varlen.backward(dout, q, k, v, out, lse, layout, scale, provider)

    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(out, want, **close)
    for name, got, expected in zip("qkv", grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, **close, msg=lambda text, name=name: f"d{name}: {text}")
        assert got.is_contiguous()
    first = int(case.q_start)
    padding = (segments.doc[:, first : first + case.queries] < 0)[:, None].expand(lse.shape)
    assert torch.equal(lse == -torch.inf, padding)
    assert (out[padding] == 0).all()
    assert (grads[0][padding] == 0).all()
    unread = (segments.doc < 0)[:, None].expand(k.shape[:3])
    assert (grads[1][unread] == 0).all()
    assert (grads[2][unread] == 0).all()
    assert out.is_contiguous()
    assert lse.is_contiguous()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("block_size", "top_k"), [(0, 1), *product((1, 7, 64, 100), (1, 2, 3, 50))])
def test_matches_reference(rows: str, block_size: int, top_k: int) -> None:
    check(Case(rows, block_size=block_size, top_k=top_k))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rows", ["whole", "padded"])
@pytest.mark.parametrize("block_size", [0, 7])
def test_groups_of_heads(heads: tuple[int, int], rows: str, block_size: int) -> None:
    check(Case(rows, heads, block_size))


@pytest.mark.parametrize("rows", ["whole", "packed", "padded"])
@pytest.mark.parametrize("block_size", [0, 7, 64])
@pytest.mark.parametrize(("queries", "first"), [(1, None), (1, 0), (13, None), (13, 37), (50, 40)])
@pytest.mark.parametrize("tensor", [False, True])
def test_fewer_queries_than_keys(rows: str, block_size: int, queries: int, first: int | None, tensor: bool) -> None:
    check(Case(rows, block_size=block_size, queries=queries, first=first, tensor=tensor))


@pytest.mark.parametrize("strides", ["heads", "tokens", "cache"])
@pytest.mark.parametrize("bound", [1, 6000, 20_000, 200_000])
@pytest.mark.parametrize(("rows", "block_size"), [("padded", 0), ("padded", 7), ("whole", 7)])
def test_slabs(monkeypatch: pytest.MonkeyPatch, strides: str, bound: int, rows: str, block_size: int) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", bound)
    for queries in (3,) if bound == 1 else (96, 5):
        stub = Stub()
        check(Case(rows, block_size=block_size, queries=queries, strides=strides), stub)
        if bound < 200_000:
            assert len(stub.calls) > 4


@pytest.mark.parametrize("rows", ["packed", "padded"])
@pytest.mark.parametrize("block_size", [0, 7])
def test_loose_bounds(rows: str, block_size: int) -> None:
    """A compiled forward that was given no host ints uses the row's length for both."""
    check(Case(rows, block_size=block_size), segments=replace(segments_of(rows), max_docs=SLOTS, max_len=SLOTS))


@pytest.mark.parametrize("dim", [8, 12])
@pytest.mark.parametrize("block_size", [0, 7])
def test_few_runs_a_call_and_odd_head_dims(dim: int, block_size: int) -> None:
    check(Case(block_size=block_size, dim=dim), Fitted(Stub(), most_runs=3))


def test_keys_are_read_in_place() -> None:
    for case in (Case("whole"), Case("whole", queries=1)):
        q, k, v, _ = tensors_of(case)
        segments, stub = segments_of("whole"), Stub()
        routes = routes_of(case, q, k, segments)
        varlen.forward(q, k, v, Layout.of(segments, routes, case.q_start), 1.0, stub)
        for _, keys, _ in stub.calls:
            assert keys.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_slab_holds_no_more_than_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 100_000)
    for strides in ("heads", "tokens"):
        case = Case("packed", heads=(8, 2), top_k=4, strides=strides)
        q, k, v, dout = tensors_of(case)
        segments, stub = segments_of("packed"), Stub()
        layout = Layout.of(segments, routes_of(case, q, k, segments), case.q_start)
        out, lse = varlen.forward(q, k, v, layout, 1.0, stub)
        gathered = [2 * x.nbytes for x, _, runs in stub.calls if not runs.causal]
        assert 0 < max(gathered) <= 100_000
        stub.calls.clear()
        varlen.backward(dout, q, k, v, out, lse, layout, 1.0, stub)
        gathered = [4 * x.nbytes for x, _, runs in stub.calls if not runs.causal]
        assert 0 < max(gathered) <= 100_000


def test_rounds_once() -> None:
    """In bfloat16 the result is the merge of the kernel's rounded parts, rounded once more: not worse than that."""
    case = Case("packed", top_k=4)
    q, k, v, _ = (x.bfloat16() for x in tensors_of(case))
    segments = segments_of("packed")
    routes = routes_of(case, q, k, segments)
    want = reference.run(q.double(), k.double(), v.double(), segments=segments, routes=routes, q_start=0, scale=0.3)
    out, lse = varlen.forward(q, k, v, Layout.of(segments, routes, case.q_start), 0.3, Stub())
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    # Two roundings, each half a unit in the last place of a value no larger than the largest |v| that was read.
    assert (out.double() - want).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps / 2 * v.abs().max()


FAKE = [
    Case("whole"),
    Case("packed"),
    Case("padded", top_k=1),
    Case("padded", block_size=0),
    Case("padded", queries=1),
    Case("packed", queries=5, first=9, tensor=True),
    Case("padded", heads=(8, 1), strides="tokens", dim=12),
]


def hollow(x: Tensor) -> Tensor:
    """Same shape and strides, without data under a fake tensor mode."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)


@pytest.mark.parametrize("case", FAKE, ids=str)
@pytest.mark.parametrize("bound", [80_000, 512 << 20])
def test_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch, case: Case, bound: int) -> None:
    """Tensors that hold no data cannot be read by the host; the calls also bind to PyTorch's real operators."""
    monkeypatch.setattr(slabs, "SLAB_BYTES", bound)
    q, k, v, dout = (x.bfloat16() for x in tensors_of(case))
    segments = segments_of(case.rows)
    layout = Layout.of(segments, routes_of(case, q, k, segments), case.q_start)
    with FakeTensorMode():
        fake = {name: hollow(x) for name in layout.__slots__ if isinstance(x := getattr(layout, name), Tensor)}
        layout = replace(layout, **fake)
        q, k, v, dout = map(hollow, (q, k, v, dout))
        with pytest.raises(DataDependentOutputException):
            layout.doc.max().item()
        out, lse = varlen.forward(q, k, v, layout, 0.3, Fitted(Aten()))
        assert (out.shape, out.dtype, out.is_contiguous()) == (q.shape, q.dtype, True)
        assert (lse.shape, lse.dtype, lse.is_contiguous()) == (q.shape[:3], torch.float32, True)
        grads = varlen.backward(dout, q, k, v, out, lse, layout, 0.3, Fitted(Aten()))
        for grad, x in zip(grads, (q, k, v), strict=True):
            assert (grad.shape, grad.dtype, grad.is_contiguous()) == (x.shape, x.dtype, True)


@pytest.mark.parametrize("block_size", [0, 7])
def test_padding_is_never_looked_at(block_size: int) -> None:
    """NaN in every tensor at padding, and routes that name blocks there, change no bit anywhere."""
    case = Case("padded", block_size=block_size)
    tensors, segments = tensors_of(case), segments_of(case.rows)
    routes = routes_of(case, *tensors[:2], segments)
    padding = segments.doc < 0
    results = []
    for poisoned in (False, True):
        q, k, v, dout = (x.masked_fill(padding[:, None, :, None], torch.nan) if poisoned else x for x in tensors)
        if poisoned and routes is not None:
            routes = replace(routes, index=routes.index.masked_fill(padding[:, None, :, None], 0))
        layout = Layout.of(segments, routes, case.q_start)
        out, lse = varlen.forward(q, k, v, layout, 0.3, Stub())
        results.append((out, lse, *varlen.backward(dout, q, k, v, out, lse, layout, 0.3, Stub())))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
