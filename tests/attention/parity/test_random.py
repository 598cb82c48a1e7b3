"""Geometry nobody thought of: hypothesis draws it, the oracle decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attention.parity.test_partial import in_chunks
from tests.attention.parity.test_semantics import check_same, truth
from tests.attention.test_gate import check_invariants
from tests.factories import Case, gate_routes, inputs, oracle, random_routes, run
from tests.marks import able
from tests.tolerance import check

# Derandomized, so that a failure on one machine is a failure on all; the seed of the inputs is drawn with the rest.
SOME = settings(max_examples=40, deadline=None, derandomize=True, database=None)
FEW = settings(SOME, max_examples=20)

SEEDS = st.integers(0, 3)
SLOTS = st.integers(1, 90)


@st.composite
def a_row(draw: st.DrawFn, slots: int) -> tuple[int, ...]:
    """Signed lengths that fill ``slots``: documents and stretches of padding in any order."""
    row: list[int] = []
    while left := slots - sum(map(abs, row)):
        length = draw(st.integers(1, left))
        row.append(-length if draw(st.integers(0, 3)) == 0 else length)
    return tuple(row)


@st.composite
def a_case(draw: st.DrawFn, *, full: bool = False, partial: bool = True) -> Case:
    slots = draw(SLOTS)
    rows = tuple(draw(a_row(slots)) for _ in range(draw(st.integers(1, 2))))
    hkv = draw(st.sampled_from((1, 2)))
    queries = draw(st.integers(1, slots)) if partial else slots
    return Case(
        rows,
        0 if full else draw(st.one_of(st.integers(1, 12), st.integers(13, 100))),
        draw(st.one_of(st.integers(1, 5), st.just(50))),
        hkv * draw(st.sampled_from((1, 2, 3))),
        hkv,
        draw(st.sampled_from((8, 16, 33))),
        queries=queries,
        first=draw(st.integers(0, slots - queries)),
    )


@SOME
@given(a_case(), SEEDS)
def test_flash_equals_the_oracle(case: Case, seed: int) -> None:
    data = inputs(case, seed=seed)
    routes, chosen = random_routes(case, seed)
    result, reference = (run(case, data, name, routes=routes, grad=True) for name in ("flash", "reference"))
    check(result, oracle(case, data, chosen), reference)


@SOME
@given(a_case(), SEEDS)
def test_decode_equals_the_oracle(case: Case, seed: int) -> None:
    data = inputs(case, seed=seed)
    routes, chosen = random_routes(case, seed)
    result, reference = (run(case, data, name, routes=routes) for name in ("decode", "reference"))
    check(result, oracle(case, data, chosen), reference)


FIXED = Case(((90,), (90,)), hq=4, hkv=2, dim=64, top_k=3)


@pytest.mark.skipif("flex" not in able(FIXED), reason="this machine cannot compile FlexAttention")
@SOME
@given(a_row(90), a_row(90), st.integers(1, 100), SEEDS)
def test_flex_equals_the_oracle(first: tuple[int, ...], second: tuple[int, ...], block_size: int, seed: int) -> None:
    """Documents, padding, blocks, routes and numbers of one shape, which is compiled once."""
    case = replace(FIXED, rows=(first, second), block_size=block_size)
    data = inputs(case, seed=seed)
    routes, chosen = random_routes(case, seed)
    result, reference = (run(case, data, name, routes=routes) for name in ("flex", "reference"))
    check(result, oracle(case, data, chosen), reference)


@SOME
@given(a_case(), SEEDS)
def test_routed_flash_equals_routed_reference(case: Case, seed: int) -> None:
    """The way users call it: no routes given."""
    data = inputs(case, seed=seed)
    expected, reference = truth(case, data, grad=True)
    check(run(case, data, "flash", grad=True), expected, reference)


@FEW
@given(a_case(full=True), SEEDS)
def test_full_attention_equals_the_oracle(case: Case, seed: int) -> None:
    data = inputs(case, seed=seed)
    reference = run(case, data, "reference", grad=True)
    for backend in ("flash", "sdpa"):
        check(run(case, data, backend, grad=True), oracle(case, data), reference, backend)


@FEW
@given(a_case(partial=False), SEEDS, st.data())
def test_chunks_equal_one_shot(case: Case, seed: int, data: st.DataObject) -> None:
    cuts = data.draw(st.sets(st.integers(1, max(1, case.slots - 1)), max_size=4))
    bounds = sorted({0, case.slots, *(c for c in cuts if c < case.slots)})
    given_inputs = inputs(case, seed=seed)
    whole = run(case, given_inputs, "flash", grad=True)
    parts = in_chunks(case, given_inputs, "flash", bounds, grad=True, cut=data.draw(st.booleans()))
    check_same(parts, whole, case, given_inputs)


@SOME
@given(a_case(), SEEDS, st.sampled_from((0.0, 1.0)))
def test_gate_invariants(case: Case, seed: int, spread: float) -> None:
    """With random scores and with all scores tied."""
    data = inputs(case, seed=seed)
    routes = gate_routes(case, data.q * spread, data.k)
    check_invariants(case, routes)
    if spread == 0:
        index = torch.where(routes.index < 0, -2 * case.slots, routes.index.int())
        tied = routes.index[..., 1:] >= 0
        assert (index[..., 1:] - index[..., :-1])[tied].eq(-1).all(), "ties take the most recent blocks in order"


@FEW
@given(a_case(partial=False), SEEDS)
def test_outputs_before_a_change_do_not_move(case: Case, seed: int) -> None:
    data = inputs(case, seed=seed)
    routes, _ = random_routes(case, seed)
    cut = case.slots // 2
    later = torch.arange(case.slots)[:, None] >= cut
    other = inputs(case, seed=seed + 10)
    changed = replace(data, **{n: torch.where(later, getattr(other, n), getattr(data, n)) for n in "qkv"})
    before, after = (run(case, x, "flash", routes=routes).out for x in (data, changed))
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
