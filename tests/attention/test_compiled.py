"""The CPU schedule as compiled code, called directly: each arithmetic, each way its input may lie, each cut of work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mobazoo.attention.kernels import cpu_compiled
from mobazoo.attention.kernels.cpu_compiled import STAGES
from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.native import arguments, library
from mobazoo.attention.native.arguments import BFLOAT16, BFLOAT16_BY_FLOAT32, BFLOAT16_BY_VECTORS, FLOAT32
from mobazoo.attention.routing import Routes
from tests.attention.parity.cases import FULL, SPARSE
from tests.factories import Case, Inputs, documents, inputs, oracle, padding, random_routes, run, segments_of
from tests.oracle import Attention, unit_roundoff
from tests.tolerance import NAMES, ROUNDINGS, Result, check

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")

# Where a processor has no such instructions, the next one serves, and the results are as right.
ARITHMETIC = {
    "float32": (torch.float32, FLOAT32),
    "bfloat16": (torch.bfloat16, BFLOAT16),
    "by vectors": (torch.bfloat16, BFLOAT16_BY_VECTORS),
    "by float32": (torch.bfloat16, BFLOAT16_BY_FLOAT32),
}
NARROW = (torch.float32, torch.bfloat16, torch.float16)

CASES = {name: SPARSE[name] for name in ("b1k2", "b7k3", "b64k3", "b100k2", "chunk", "middle", "whole")}
CASES |= {f"full {name}": FULL[name] for name in ("4to2d33", "8to1d64", "chunk", "middle", "whole")}
CASES |= {f"head dim {dim}": Case(((-3, 70, 1, 41),), 16, 3, 4, 2, dim) for dim in (8, 33, 64, 80, 128, 256)}
CASES |= {f"group {group}": Case(((-3, 70, 1, 41),), 16, 3, 2 * group, 2, 48) for group in (1, 2, 3, 8)}
CASES |= {
    # Keys are laid out 512 at a time, and scores are in hand for 128.
    "block of 600": Case(((-7, 1900),), 600, 3, 2, 1, 16),
    "block of 1100": Case(((2300, -5),), 1100, 2, 2, 1, 16),
    "long documents": Case(((1300, 40),), 0, 1, 4, 2, 16),
    "nothing routed": Case(((90, -3, 20),), 16, 1, 4, 2, 32),
}
# 32 query heads share a key head, so that few tokens are many pieces: forward from 16 tokens, backward from 128.
PIECES = Case(((450, -13, 137),), 50, 3, 32, 1, 16)


@pytest.fixture(params=ARITHMETIC)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of an arithmetic, which then is what serves it."""
    dtype, number = ARITHMETIC[request.param]
    monkeypatch.setitem(arguments.ARITHMETIC, dtype, number)
    return dtype


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def layout_of(case: Case, routes: Routes | None = None) -> Layout:
    return Layout.of(segments_of(case.rows), routes, case.q_start)


def routes_of(case: Case) -> Routes | None:
    return random_routes(case)[0] if case.block_size else None


def compiled(case: Case, data: Inputs, layout: Layout | None = None, scale: float | None = None) -> Result:
    """Output and gradients."""
    layout = layout_of(case, routes_of(case)) if layout is None else layout
    scale = case.dim**-0.5 if scale is None else scale
    out, lse = cpu_compiled.forward(*data.qkv, layout, scale)
    return Result(out, cpu_compiled.backward(data.dout, *data.qkv, out, lse, layout, scale))


def log_sums(case: Case, data: Inputs) -> Tensor:
    return cpu_compiled.forward(*data.qkv, layout_of(case, routes_of(case)), case.dim**-0.5)[1]


def truth(case: Case, data: Inputs, scale: float | None = None) -> tuple[Attention, Result]:
    """The float64 oracle and the reference backend."""
    routes, chosen = random_routes(case) if case.block_size else (None, [])
    return oracle(case, data, chosen, scale), run(case, data, "reference", routes=routes, grad=True, scale=scale)


@cache
def known(case: Case, dtype: torch.dtype) -> tuple[Inputs, Attention, Result]:
    """Inputs and truth of a case, which arithmetics share."""
    data = inputs(case, dtype)
    exact, reference = truth(case, data)
    return data, exact.settled(), reference


def same(a: Result, b: Result) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


def test_serves_what_it_widens_and_no_float64() -> None:
    assert [cpu_compiled.serves(dtype) for dtype in (*NARROW, torch.float64)] == [True, True, True, False]


@pytest.mark.parametrize("name", CASES)
def test_is_right(name: str, dtype: torch.dtype) -> None:
    data, exact, reference = known(CASES[name], dtype)
    check(compiled(CASES[name], data), exact, reference, "compiled")


@pytest.mark.parametrize("name", ["b7k3", "middle", "full 4to2d33"])
def test_float16_is_widened(name: str) -> None:
    data, exact, reference = known(CASES[name], torch.float16)
    check(compiled(CASES[name], data), exact, reference, "compiled")


@pytest.mark.parametrize("scale", [1.0, 0.0, -0.3])
@pytest.mark.parametrize("name", ["b7k3", "full middle"])
def test_any_scale(name: str, scale: float, dtype: torch.dtype) -> None:
    """A negative one is a positive one of the negated queries."""
    case, data = CASES[name], inputs(CASES[name], dtype)
    result = compiled(case, data, scale=scale)
    if scale < 0:
        data, (dq, dk, dv) = replace(data, q=-data.q), result.gradients
        result = replace(result, gradients=(-dq, dk, dv))
    check(result, *truth(case, data, abs(scale)), f"scale {scale}")


@pytest.mark.parametrize("name", ["b64k3", "middle", "full 4to2d33"])
def test_inputs_may_lie_otherwise(name: str, dtype: torch.dtype) -> None:
    """Heads inside tokens, as projections give them, and parts of something larger."""
    case = CASES[name]
    data = inputs(case, dtype)
    want = compiled(case, data)
    inside = data.map(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    part = data.map(lambda x: torch.cat([x, x], 3)[..., case.dim :])
    apart = replace(data, dout=data.dout.mT.contiguous().mT)  # numbers of one token
    for other in (inside, part, apart):
        assert not other.dout.is_contiguous()
        assert same(compiled(case, other), want)
    ones = data.dout.new_ones(())  # the gradient of a sum
    once, each = ones.expand(data.dout.shape), torch.ones_like(data.dout)
    assert same(compiled(case, replace(data, dout=once)), compiled(case, replace(data, dout=each)))


@pytest.mark.parametrize("number", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["b7k3", "middle"])
def test_routes_may_lie_otherwise(name: str, number: torch.dtype) -> None:
    """Numbers of any width, all tables between other numbers, a start that is a tensor."""
    case, routes = CASES[name], random_routes(CASES[name], seed=1)[0]
    assert routes.index.dtype == torch.int16
    data, layout = inputs(case), layout_of(case, routes)

    def between(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, 3)], -1)[..., 0]

    assert layout.start is not None
    tables = {"doc": layout.doc, "pos": layout.pos, "start": layout.start, "index": routes.index.to(number)}
    lying = {name: between(x) for name, x in tables.items()}
    given = replace(layout, **lying, q_start=torch.tensor(case.q_start))
    assert same(compiled(case, data, given), compiled(case, data, layout))


def test_rows_may_share_their_tables() -> None:
    """Documents and blocks of one row, expanded to a batch."""
    case = Case(((70, -4, 46),) * 2, 16, 3, 4, 2, 32)
    layout = layout_of(case, routes_of(case))
    assert layout.start is not None
    assert torch.equal(layout.start[0], layout.start[1])
    once = {name: getattr(layout, name)[:1].expand(2, -1) for name in ("doc", "pos", "start")}
    data = inputs(case)
    assert same(compiled(case, data, replace(layout, **once)), compiled(case, data, layout))


@pytest.mark.parametrize("case", [PIECES, PIECES.full], ids=["routed", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_right_in_pieces_and_the_same_bits_every_time(case: Case, dtype: torch.dtype, threads: int) -> None:
    """Of one key head, whose gradients several threads add up, each its own part."""
    data, exact, reference = known(case, dtype)
    first = compiled(case, data)
    check(first, exact, reference, f"{threads} threads")
    for _ in range(3):
        assert same(compiled(case, data), first)
    assert torch.get_num_threads() == threads


def test_more_threads_than_work(threads: int) -> None:
    case = Case(((3,),), 2, 2, 1, 1, 8)
    data, exact, reference = known(case, torch.float32)
    check(compiled(case, data), exact, reference, f"{threads} threads")


# What is put into one document is nothing to the others.
POISONED = Case(((40, 60, -5, 45), (100, 50)), 8, 3, 4, 2, 32)


def elsewhere(row: int, document: slice) -> Tensor:
    """Bool ``[B, S]``: slots of other documents than one."""
    mask = torch.ones(2, POISONED.slots, dtype=torch.bool)
    mask[row, document] = False
    return mask


def poisoned(data: Inputs, change: str, head: int, slot: int) -> tuple[Inputs, slice]:
    """A NaN in row 0, and the slots of the document that it is in."""
    changed = replace(data, **{change: getattr(data, change).clone()})
    getattr(changed, change)[0, head, slot, 5] = float("nan")
    (document,) = (slots for row, slots in documents(POISONED.rows) if row == 0 and slots.start <= slot < slots.stop)
    return changed, document


@pytest.mark.parametrize("slot", [40, 61, 99])
def test_a_key_that_is_no_number_reaches_who_reads_it(slot: int, dtype: torch.dtype) -> None:
    """And no other; in gradients, no other document and no other key head."""
    data = inputs(POISONED, dtype)
    changed, document = poisoned(data, "k", 1, slot)
    clean, result = compiled(POISONED, data), compiled(POISONED, changed)
    reads = oracle(POISONED, data, random_routes(POISONED)[1]).mask[..., slot].clone()
    reads[1], reads[:, :2] = False, False
    assert reads.any()
    assert torch.equal(result.out.isnan().all(-1), reads)
    assert torch.equal(result.out[~reads], clean.out[~reads])
    others = elsewhere(0, document)
    assert result.gradients[0][reads].isnan().all()
    for got, want in zip(result.gradients, clean.gradients, strict=True):
        assert want.isfinite().all()
        assert torch.equal(got.transpose(1, 2)[others], want.transpose(1, 2)[others])
        half = got.shape[1] // 2
        assert torch.equal(got[:, :half], want[:, :half])


@pytest.mark.parametrize("change", ["v", "dout"])
def test_what_is_no_number_stays_in_its_document(change: str, dtype: torch.dtype) -> None:
    data = inputs(POISONED, dtype)
    changed, document = poisoned(data, change, 1, 61)
    clean, result = compiled(POISONED, data), compiled(POISONED, changed)
    others = elsewhere(0, document)
    assert any(x.isnan().any() for x in result.tensors)
    for got, want in zip(result.tensors, clean.tensors, strict=True):
        assert torch.equal(got.transpose(1, 2)[others], want.transpose(1, 2)[others])


def test_a_query_that_is_no_number_is_alone(dtype: torch.dtype) -> None:
    """Its output and gradient are none; other queries' are what they were, and so is all of other documents."""
    data = inputs(POISONED, dtype)
    changed, document = poisoned(data, "q", 2, 77)
    clean, result = compiled(POISONED, data), compiled(POISONED, changed)
    here = torch.zeros(result.out.shape[:3], dtype=torch.bool)
    here[0, 2, 77] = True
    for got, want in ((result.out, clean.out), (result.gradients[0], clean.gradients[0])):
        assert got[here].isnan().all()
        assert torch.equal(got[~here], want[~here])
    others = elsewhere(0, document)
    for got, want in zip(result.gradients, clean.gradients, strict=True):
        assert torch.equal(got.transpose(1, 2)[others], want.transpose(1, 2)[others])


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("name", ["b7k3", "full middle"])
def test_values_of_any_size(name: str, size: float, dtype: torch.dtype) -> None:
    case = CASES[name]
    data = inputs(case, dtype)
    data = replace(data, v=data.v * size)
    check(compiled(case, data), *truth(case, data), f"values of {size}")


@pytest.mark.parametrize("times", [1.0, 2.0**10, 2.0**20])
@pytest.mark.parametrize("name", ["routed", "full"])
def test_scores_of_a_million(name: str, times: float, dtype: torch.dtype) -> None:
    """And more. Every score is exact, and the next one so far below that the largest takes all: its value is the
    output, its weight 1 in the backward too.

    What remains is to round the weight to the dtype, its quotient and product in float32, and the result to the dtype,
    half an ulp each.
    """
    case = {"routed": Case(((230,),), 16, 3, 2, 1, 8), "full": Case(((230,),), 0, 1, 2, 1, 8)}[name]
    data = inputs(case, dtype)
    order = torch.randperm(230, generator=torch.Generator().manual_seed(1))
    for x, numbers in ((data.q, torch.tensor(1000.0 * times)), (data.k, 8.0 * (order - 115))):
        x.zero_()
        x[..., 3] = numbers
    data.q[:, 1] *= -1
    exact = oracle(case, data, random_routes(case)[1] if case.block_size else [], 1.0)
    assert 8e5 * times < exact.score_magnitude < 1e6 * times
    result = compiled(case, data, scale=1.0)
    best = torch.where(exact.mask, data.q.double() @ data.k.double().mT, -torch.inf).argmax(-1)
    want = data.v[0, 0][best]
    u, wide = unit_roundoff(dtype), unit_roundoff(torch.float32)
    torch.testing.assert_close(result.out, want, rtol=2 * u + 2 * wide, atol=0)
    slope = 2 * float((data.dout.double().abs() @ data.v.double().abs().mT).max())
    nothing = 2.0**-125 * 230 * 2 * slope * 1016  # for bfloat16 weights end there, not at 0: in all sums together
    wants = (exact.out, *exact.gradients)
    for name, got, wanted, magnitude in zip(NAMES, result.tensors, wants, exact.magnitudes, strict=True):
        bound = ROUNDINGS[name] * u * magnitude + nothing * times
        assert ((got.double() - wanted).abs() <= bound).all(), name


@pytest.mark.parametrize("step", [1 / 16, 1 / 4, 1, 8])
@pytest.mark.parametrize("name", ["routed", "full"])
def test_scores_that_rise(name: str, step: float, dtype: torch.dtype) -> None:
    """Each block and each chunk brings larger scores than all before: a little, or too much for weights beside them."""
    case = {"routed": Case(((230,),), 16, 4, 2, 1, 8), "full": Case(((230,),), 0, 1, 2, 1, 8)}[name]
    data = inputs(case, dtype)
    data.q[..., 3], data.k[..., 3] = 1, step * torch.arange(230)
    check(compiled(case, data, scale=1.0), *truth(case, data, 1.0), f"scores that rise by {step}")


def test_numbers_below_the_normal_ones_are_left_to_others(dtype: torch.dtype) -> None:
    """Threads that took them for zero in a call do not afterwards."""
    compiled(PIECES, inputs(PIECES, dtype))
    tiny = torch.full((1 << 20,), 1e-30) * 1e-10
    assert (tiny > 0).all()


def test_padding_is_zero_and_reads_nothing(dtype: torch.dtype) -> None:
    """Also where a row is nothing else."""
    case = Case(((-60,), (-9, 30, -21)), 8, 3, 4, 2, 32)
    data, padded = inputs(case, dtype), padding(case.rows)
    result, lse = compiled(case, data), log_sums(case, data).transpose(1, 2)
    assert (lse[padded] == -torch.inf).all()
    assert lse[~padded].isfinite().all()
    for x in result.tensors:
        assert (x.transpose(1, 2)[padded] == 0).all()
        assert x.isfinite().all()


@pytest.mark.parametrize("name", ["b7k3", "b64k3", "middle", "full whole", "head dim 256", "block of 600"])
def test_log_sum_exp(name: str, dtype: torch.dtype) -> None:
    """Accumulated in float32 for every dtype, so that u is float32's in all of these, each the worst case.

    - A score: D products and sums, the scale (rounded, with log2(e)) and its product, the difference from the
      largest, log(2) times the largest: D + 8 roundings of ``scale * |q| . |k|``.
    - The sum of n weights: for each key one rounding of the sum, two of its exponential, and as many where the sum
      shrinks beside a larger score; where products are bfloat16's, the exponential is 3e-6 off instead of two.
    - The logarithm and the last sum: 4 of the result.
    """
    data, _, _ = known(CASES[name], dtype)
    exact = oracle(CASES[name], data, random_routes(CASES[name])[1] if CASES[name].block_size else [])
    scores = exact._scores.detach().masked_fill(~exact.mask, -torch.inf)
    want = scores.logsumexp(-1)
    sizes = torch.where(exact.mask, data.q.double().abs() @ exact._repeated(data.k.double().abs()).mT, 0.0)
    size, keys, u = sizes.amax(-1) * exact.scale, exact.mask.sum(-1), unit_roundoff(torch.float32)
    bound = u * ((CASES[name].dim + 8) * size + 6 * keys + 4 * (1 + want.abs()))
    if dtype == torch.bfloat16:
        bound += 3e-6
    got = log_sums(CASES[name], data)
    assert got.dtype == torch.float32
    here = exact.mask.any(-1)
    assert ((got.double() - want)[here].abs() <= bound[here]).all()
    assert (got[~here] == -torch.inf).all()


def test_seconds_by_stage_add_up() -> None:
    """To less than the call took, and to more with every call."""
    case = CASES["b64k3"]
    data, layout = inputs(case), layout_of(case, routes_of(case))
    spent = torch.zeros(len(STAGES), dtype=torch.float64)
    assert len(STAGES) == 7
    before, wall = spent.clone(), 0.0
    want = cpu_compiled.forward(*data.qkv, layout, 0.125)
    for _ in range(2):
        since = perf_counter()
        got = cpu_compiled.forward(*data.qkv, layout, 0.125, spent)
        wall += perf_counter() - since
        assert (spent > before).all()
        assert spent.sum() < wall
        before = spent.clone()
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("which", ["moba_forward", "moba_backward"])
def test_says_where_memory_ends(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = library()
    stub = SimpleNamespace(moba_forward=real.moba_forward, moba_backward=real.moba_backward)
    setattr(stub, which, lambda *_: 1)
    monkeypatch.setattr(cpu_compiled, "library", lambda: stub)
    with pytest.raises(MemoryError, match="attend: no memory left for what a thread of"):
        compiled(CASES["b7k3"], inputs(CASES["b7k3"]))
