"""Rows with nothing in them and other geometry that breaks kernels: right where defined, no NaN anywhere."""

from __future__ import annotations

import pytest
import torch

from mobazoo.attention import Full, MoBA, Routes, Segments, attend
from tests.factories import Case, chosen_by, gate_routes, inputs, oracle, run, segments_of
from tests.marks import able, on_backends, trains
from tests.tolerance import check

EDGES = {
    "empty_row": Case(((-40,), (40,)), 7, 3),
    "all_padding": Case(((-40,), (-40,)), 7, 3),
    "one_token_documents": Case(((1,) * 20, (1, -3, 1, 1, 14)), 7, 3),
    "one_token": Case(((1,),), 7, 3),
    "shorter_than_a_block": Case(((5,),), 7, 3),
    "exactly_one_block": Case(((7, -1, 7),), 7, 2),
    "block_of_one": Case(((9, -1, 2),), 1, 2),
    "last_token_only": Case(((-39, 1),), 7, 3),
    "padding_queries_only": Case(((-20, 20), (-20, 20)), 7, 2, queries=12, first=3),
}
EDGES |= {f"{name}_full": case.full for name, case in EDGES.items()}


@on_backends(EDGES, core=("empty_row",))
def test_edges_equal_the_oracle(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    data = inputs(case, dtype, device)
    chosen = chosen_by(gate_routes(case, data.q, data.k)) if case.block_size else []
    result = run(case, data, backend, grad=trains(case, dtype, backend, device))
    check(result, oracle(case, data, chosen), run(case, data, "reference", grad=True), backend)
    for tensor in result.tensors:
        assert not tensor.isnan().any()


@on_backends({name: case for name, case in EDGES.items() if case.block_size}, core=("empty_row", "one_token_documents"))
def test_edges_with_routes_given(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    """As ``route`` makes them, with no blocks in the table where a row has no complete one."""
    data = inputs(case, dtype, device)
    routes = gate_routes(case, data.q, data.k)
    expected, grad = oracle(case, data, chosen_by(routes)), trains(case, dtype, backend, device)
    result, reference = (run(case, data, name, routes=routes, grad=grad) for name in (backend, "reference"))
    check(result, expected, reference, backend)


@on_backends({"sparse": Case(((40,), (40,)), 7, 3), "full": Case(((40,),), 0)}, core=("sparse",))
@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_flat_and_sharp_softmax(case: Case, dtype: torch.dtype, backend: str, device: str, spread: float) -> None:
    """Scores that all agree, and scores so far apart that all but one weight underflow."""
    data = inputs(case, dtype, device).map(lambda x: x * spread)
    chosen = chosen_by(gate_routes(case, data.q, data.k)) if case.block_size else []
    grad = trains(case, dtype, backend, device)
    result, reference = (run(case, data, name, grad=grad) for name in (backend, "reference"))
    check(result, oracle(case, data, chosen), reference, backend)


@pytest.mark.parametrize("pattern", [Full(), MoBA(7, 3), MoBA(7, 50)], ids=str)
@pytest.mark.parametrize("shape", [(0, 40, 40), (2, 0, 40), (2, 0, 0)], ids=["no rows", "no queries", "no slots"])
@pytest.mark.parametrize("backend", ["auto", "reference", "flash"])
def test_nothing_to_do(backend: str, shape: tuple[int, int, int], pattern: Full | MoBA) -> None:
    batch, length, slots = shape
    q = torch.randn(batch, 4, length, 16, requires_grad=True)
    k = torch.randn(batch, 2, slots, 16, requires_grad=True)
    out = attend(q, k, k.clone(), pattern=pattern, backend=backend)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("backend", able(Case(((40,), (40,)), 7, 3)))
def test_all_slots_of_routes_empty_is_block_local(backend: str) -> None:
    case = Case(((40,), (40,)), 7, 3)
    data, segments = inputs(case), segments_of(case.rows)
    table = gate_routes(case, data.q, data.k).start
    nothing = Routes(torch.full((2, 4, 40, 2), -1, dtype=torch.int16), table, 7)
    got = attend(*data.qkv, pattern=MoBA(7, 3), routes=nothing, backend=backend, segments=segments)
    want = attend(*data.qkv, pattern=MoBA(7, 1), backend="reference", segments=segments)
    assert torch.allclose(got, want, atol=1e-5)


def test_segments_default_is_one_document_a_row() -> None:
    case = Case(((40,), (40,)), 7, 3)
    data = inputs(case)
    assert torch.equal(
        attend(*data.qkv, pattern=case.pattern),
        attend(*data.qkv, pattern=case.pattern, segments=Segments.single(2, 40)),
    )
