"""``T < S``: chunks, single tokens and queries in the middle of a row give what one shot gives."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from mobazoo.attention import attend
from tests.attention.parity.test_semantics import check_same
from tests.factories import Case, Inputs, chosen_by, gate_routes, inputs, run, segments_of
from tests.marks import COMPILING, SINGLE, able, on_backends, trains
from tests.tolerance import Result

ROWS = Case(((90,), (-13, 50, 27), (31, -2, 57)), 7, 3, 4, 2, 64)
PLAIN = Case(((90,),), 16, 2, 4, 2, 64)
CASES = {"packed": ROWS, "packed_full": ROWS.full, "plain": PLAIN, "plain_full": PLAIN.full}


def queries(data: Inputs, start: int, stop: int) -> Inputs:
    return Inputs(data.q[:, :, start:stop], data.k, data.v, data.dout[:, :, start:stop])


def in_chunks(case: Case, data: Inputs, backend: str, bounds: list[int], *, grad: bool, cut: bool) -> Result:
    """One call per chunk; with ``cut`` a chunk sees the keys up to its own last one, as a growing cache holds them."""
    outs, dqs, dk, dv = [], [], torch.zeros_like(data.k), torch.zeros_like(data.v)
    segments = segments_of(case.rows, str(data.q.device))
    for start, stop in pairwise(bounds):
        end = stop if cut else case.slots
        part = queries(data, start, stop)
        part = replace(part, k=part.k[:, :, :end], v=part.v[:, :, :end])
        seen = replace(
            segments,
            doc=segments.doc[:, :end],
            pos=segments.pos[:, :end],
            max_len=min(segments.max_len, end),
        )
        result = run(case, part, backend, grad=grad, segments=seen, q_start=start)
        outs.append(result.out)
        if grad:
            dqs.append(result.gradients[0])
            dk[:, :, :end] += result.gradients[1]
            dv[:, :, :end] += result.gradients[2]
    return Result(torch.cat(outs, 2), (torch.cat(dqs, 2), dk, dv) if grad else ())


@pytest.mark.parametrize("cut", [True, False], ids=["growing", "static"])
@pytest.mark.parametrize("bounds", [[0, 40, 41, 77, 90], list(range(91))], ids=["chunks", "tokens"])
@on_backends(CASES, SINGLE, core=())
def test_chunks_equal_one_shot(
    case: Case, dtype: torch.dtype, backend: str, device: str, bounds: list[int], cut: bool
) -> None:
    data = inputs(case, dtype, device)
    grad = trains(case, dtype, backend, device)
    at_once = run(case, data, backend, grad=grad)
    check_same(in_chunks(case, data, backend, bounds, grad=grad, cut=cut), at_once, case, data)


@pytest.mark.parametrize("backend", [name for name in able(PLAIN) if name in COMPILING])
def test_chunks_and_tokens_equal_one_shot(backend: str) -> None:
    """One mixed run where each kind of call compiles: a chunk, tokens one by one, the rest, in a static cache."""
    data = inputs(PLAIN)
    bounds = [0, 40, *range(41, 49), 90]
    check_same(in_chunks(PLAIN, data, backend, bounds, grad=False, cut=False), run(PLAIN, data, backend), PLAIN, data)


@pytest.mark.parametrize("kind", ["int", "int64", "int32"])
@on_backends(CASES, SINGLE, core=("plain",))
def test_queries_in_the_middle(case: Case, dtype: torch.dtype, backend: str, device: str, kind: str) -> None:
    """``q_start`` as an int and as a 0-dim tensor, on routes and on full attention."""
    data = inputs(case, dtype, device)
    start, stop = 23, 61
    kinds = {"int64": torch.int64, "int32": torch.int32}
    q_start = start if kind == "int" else torch.tensor(start, device=device, dtype=kinds[kind])
    part = run(case, queries(data, start, stop), backend, q_start=q_start)
    whole = run(case, data, backend)
    middle = replace(case, queries=stop - start, first=start)
    check_same(part, Result(whole.out[:, :, start:stop]), middle, queries(data, start, stop))


@pytest.mark.parametrize("name", ["packed", "plain"])
def test_routes_of_chunks_are_routes_of_one_shot(name: str) -> None:
    case = CASES[name]
    data = inputs(case)
    at_once = chosen_by(gate_routes(case, data.q, data.k))
    for start, stop in ((0, 40), (40, 41), (41, 90)):
        part = replace(case, queries=stop - start, first=start)
        got = chosen_by(gate_routes(part, data.q[:, :, start:stop], data.k))
        assert got == [[head[start:stop] for head in row] for row in at_once]


@on_backends({"plain": PLAIN, "plain_full": PLAIN.full}, SINGLE, core=("plain",))
def test_default_is_the_last_queries(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    data = inputs(case, dtype, device)
    got = attend(data.q[:, :, 70:], data.k, data.v, pattern=case.pattern, backend=backend)
    want = attend(data.q[:, :, 70:], data.k, data.v, pattern=case.pattern, backend=backend, q_start=70)
    assert torch.equal(got, want)


@on_backends({"plain": PLAIN, "plain_full": PLAIN.full}, SINGLE, core=("plain",))
def test_unwritten_slots_of_a_static_cache_are_hidden(
    case: Case, dtype: torch.dtype, backend: str, device: str
) -> None:
    """Slots after the last query hold zeros or leftovers: neither is read."""
    data = inputs(case, dtype, device)
    written = queries(data, 30, 60)
    loud = replace(written, k=written.k.clone(), v=written.v.clone())
    loud.k[:, :, 60:], loud.v[:, :, 60:] = 1e4, 1e4
    zero = replace(written, k=written.k.clone(), v=written.v.clone())
    zero.k[:, :, 60:], zero.v[:, :, 60:] = 0, 0
    want = run(case, data, backend).out[:, :, 30:60]
    middle = replace(case, queries=30, first=30)
    for cache in (loud, zero):
        check_same(run(case, cache, backend, q_start=30), Result(want), middle, written)
