"""The Triton gate and centroids against the float64 oracle and torch's gate; interpreted on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from mobazoo.attention import Full, MoBA, Segments, attend, centroids, gates, selection, triton_runs
from mobazoo.attention.backends import BACKENDS
from mobazoo.attention.blocks import centroids_by
from mobazoo.attention.kernels import triton_route
from mobazoo.attention.kernels.triton_gate import ordered
from mobazoo.attention.routing import route_by
from mobazoo.errors import InputError, UnsupportedError
from tests.attention.test_centroids import CASES as MEANS
from tests.attention.test_centroids import check_means, of
from tests.attention.test_gate import check_choice, check_invariants
from tests.attention.test_gate_ties import routed
from tests.factories import Case, gate_routes, inputs, routes_on, segments_of
from tests.marks import TRITON_ON

SHORT = (torch.bfloat16, torch.float16)

PACKED = Case(((1, 50, -2, 17), (-10, 50, -10)), 8, 3, 2, 1, 64)
CASES = {
    "packed": PACKED,
    "two tiles of blocks": Case(((150,),), 2, 4, 2, 1, 16, queries=40),
    "the 64 best": Case(((150,),), 2, 64, 1, 1, 16, queries=6),
    "groups of 3, head dim 96": replace(PACKED, hq=6, hkv=2, dim=96, queries=30, first=35),
    "odd head dim": replace(PACKED, dim=33, top_k=2),
    "decode": replace(PACKED, hq=8, hkv=2, queries=1, first=45, top_k=4),
    "more than there are": replace(PACKED, top_k=9, queries=30, first=30),
}


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name: str, device: str, record_property: Callable[[str, object], None]) -> None:
    case = CASES[name]
    data = inputs(case, device=device)
    routes = routes_on(gate_routes(case, data.q, data.k, by="triton"), "cpu")
    check_choice(case, data.q.cpu(), data.k.cpu(), routes, record_property)


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_in_16_bits(dtype: torch.dtype, device: str, record_property: Callable[[str, object], None]) -> None:
    data = inputs(PACKED, dtype, device)
    routes = routes_on(gate_routes(PACKED, data.q, data.k, by="triton"), "cpu")
    check_choice(PACKED, data.q.cpu(), data.k.cpu(), routes, record_property)


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize("name", CASES)
def test_the_same_table_as_torch(name: str, device: str) -> None:
    """Bit for bit, order and empty slots too: scores that are exact in any order of sums, many of them equal."""
    case = CASES[name]
    data = inputs(case, device=device)
    k = data.k.round()
    k[..., 1:] = 0
    for q in (data.q.sign(), torch.zeros_like(data.q)):
        want, got = (gate_routes(case, q, k, by=by).index for by in ("torch", "triton"))
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize("width", [1, 8, 64, 130])
def test_ties_fall_to_the_most_recent(width: int, device: str) -> None:
    latest_first = list(range(width - 1, -1, -1))
    for top_k in (2, 9, 40):
        want = latest_first[: top_k - 1] + [-1] * (top_k - 1 - width)
        assert routed([-0.0] * width, top_k, by="triton", device=device) == want
    if width > 5:
        scores = [1.0] * width
        scores[1] = 5.0
        assert routed(scores, 4, by="triton", device=device) == [1, *latest_first[:2]]


@pytest.mark.parametrize("device", TRITON_ON)
def test_order_of_signed_scores(device: str) -> None:
    scores = [-1e30, 0.0, -1.0, 1e30, -1e-38, 1.0000001, 1e-38, 1.0]
    assert routed(scores, 8, by="triton", device=device) == [3, 5, 7, 6, 1, 4, 2]
    assert routed([0.0, -0.0, 0.0, -0.0], 3, by="triton", device=device) == [3, 2]
    assert routed([-0.0, -1.0, -3.0], 2, by="triton", device=device) == [0]


@triton.jit
def _order(X, Y):  # noqa: N803
    at = tl.arange(0, 16)
    tl.store(Y + at, ordered(tl.load(X + at)))


@pytest.mark.parametrize("device", TRITON_ON)
def test_integers_of_the_same_order(device: str) -> None:
    """As torch's gate orders scores; a dot product of today's Triton gives no minus zero, another might."""
    infinity, tiny = float("inf"), torch.finfo(torch.float32).smallest_normal
    scores = [-infinity, -3e38, -1.0, -tiny, -tiny / 4, -0.0, 0.0, tiny / 4, tiny, 1.0, 3e38, infinity]
    x = torch.tensor([*scores, 2.0, -2.0, 1e-30, -1e-30], device=device)
    y = torch.empty(16, dtype=torch.int32, device=device)
    _order[(1,)](x, y)
    keys = selection._keys(x[None, :, None], torch.zeros(1, dtype=torch.int64, device=device))
    assert torch.equal(y.long(), (keys >> 32).flatten())


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # NumPy's, in the interpreter
def test_not_a_number_never_leaves_the_range(value: float, device: str) -> None:
    data = inputs(PACKED, device=device)
    spots = torch.rand(data.q.shape[2:], generator=torch.Generator().manual_seed(1)).to(device) < 0.01
    q, k = (torch.where(spots, value, x) for x in (data.q, data.k))
    q[:, :, ::2] = value
    check_invariants(PACKED, routes_on(gate_routes(PACKED, q, k, by="triton"), "cpu"))


@pytest.mark.parametrize("device", TRITON_ON)
def test_many_blocks_are_numbered_in_int32(device: str) -> None:
    """The last of 32,768 blocks: one tile is scored, because the document is short."""
    slots = 1 << 15
    segments = Segments.from_lengths([[slots - 40, 40]], device=device)
    k = torch.zeros(1, 1, slots, 2, device=device)
    known = centroids(k, 1, segments)
    known.mean[0, 0, -3, 0] = 1.0
    q = torch.tensor([1.0, 0.0], device=device).view(1, 1, 1, 2)
    index = route_by("triton", q, known, MoBA(1, 2), segments).index
    assert index.dtype == torch.int32
    assert index.flatten().tolist() == [slots - 3]


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("whole", torch.bfloat16), ("ones", torch.float32), ("large_blocks", torch.float32)]
    + [("packed", dtype) for dtype in (torch.float32, *SHORT)],
    ids=str,
)
def test_centroids(name: str, dtype: torch.dtype, device: str) -> None:
    case = MEANS[name]
    k = inputs(case, dtype, device).k
    got = of(case, k, "triton")
    check_means(case, k.cpu(), replace(got, mean=got.mean.cpu(), start=got.start.cpu(), doc=got.doc.cpu()))


@pytest.mark.parametrize("device", TRITON_ON)
def test_more_rows_than_a_launch_takes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(((20,), (9, 11), (-4, 16)), 4, 2, 2, 1, 16, queries=8)
    data = inputs(case, device=device)
    want = gate_routes(case, data.q, data.k, by="triton")
    monkeypatch.setattr(triton_route, "MOST_PAIRS", 2)
    got = gate_routes(case, data.q, data.k, by="triton")
    assert torch.equal(got.index, want.index)


@pytest.mark.parametrize("device", TRITON_ON)
def test_strided_keys_and_queries(device: str) -> None:
    """Heads inside tokens, and a last dimension that is not dense."""
    data = inputs(PACKED, device=device)
    want = gate_routes(PACKED, data.q.sign(), data.k.sign()).index
    for turn in ((1, 2), (2, 3)):
        q, k = (x.sign().transpose(*turn).contiguous().transpose(*turn) for x in (data.q, data.k))
        assert torch.equal(gate_routes(PACKED, q, k, by="triton").index, want)


def test_operators_are_what_they_say() -> None:
    if torch.cuda.is_available():
        pytest.skip("no interpreter beside a GPU")
    q, mean = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 9, 8)
    stop = torch.arange(12)[None].expand(2, 12) * 9 // 12
    kinds = ("test_schema", "test_faketensor")
    for k in (0, 3):
        arguments = (q, mean, torch.zeros_like(stop), stop, k, "triton")
        torch.library.opcheck(torch.ops.mobazoo.gate.default, arguments, test_utils=kinds)
    start = torch.tensor([[0, 4, -1], [2, 7, -1]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.mobazoo.packed_means.default, (q, start, 4, "triton"), test_utils=kinds)


def test_only_the_triton_backend_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unmeasured kernel is nobody's silent default; beyond what it can, the backend keeps torch's gate."""
    case = replace(PACKED, rows=((40,),))
    q = inputs(case).q
    assert {b: gates.gate_of(b, q, case.pattern) for b in ("auto", *BACKENDS)} == {
        b: "triton" if b == "triton" else "torch" for b in ("auto", *BACKENDS)
    }
    assert gates.gate_of("triton", q, MoBA(8, triton_runs.MOST_READS + 2)) == "torch"
    assert gates.gate_of("triton", q.double(), case.pattern) == "torch"
    assert gates.gate_of("triton", q, Full()) == "torch"
    if not torch.cuda.is_available():
        kinds: list[str] = []
        monkeypatch.setattr("mobazoo.attention.api.route_by", lambda *a: kinds.append(a[0]) or route_by(*a))
        data = inputs(case)
        for backend in ("triton", "reference"):
            attend(*data.qkv, pattern=case.pattern, backend=backend, segments=segments_of(case.rows))
        assert kinds == ["triton", "torch"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_scores_never_reach_memory() -> None:
    """They would take 256 MiB in float32; documents, ranges and the choice take a few."""
    q, k = (torch.randn(1, heads, 1 << 14, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 1))
    segments = Segments.single(1, 1 << 14, "cuda")
    known = centroids_by("triton", k, 16, segments)
    route_by("triton", q, known, MoBA(16, 8), segments)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    route_by("triton", q, known, MoBA(16, 8), segments)
    assert torch.cuda.max_memory_allocated() - before < 8 << 20


def test_says_why_not() -> None:
    data = inputs(PACKED, torch.float64)
    segments = segments_of(PACKED.rows)
    known = centroids(data.k, 8, segments)
    with pytest.raises(UnsupportedError) as refused:
        route_by("triton", data.q, known, PACKED.pattern, segments)
    assert str(refused.value) == (
        "route: by='triton' cannot do this: the Triton kernels compute in float32, float16 and bfloat16, "
        "not in torch.float64; by='torch' can"
    )
    with pytest.raises(UnsupportedError, match="centroids: by='triton' cannot do this: the Triton kernels compute in"):
        centroids_by("triton", data.k, 8, segments)
    with pytest.raises(UnsupportedError, match="the Triton gate chooses up to 128 blocks beside the own one, got 129"):
        route_by("triton", data.q.float(), known, MoBA(8, 130), segments)
    with pytest.raises(InputError, match="centroids: by must be 'torch' or 'triton', got 'cuda'"):
        centroids_by("cuda", data.k, 8, segments)
