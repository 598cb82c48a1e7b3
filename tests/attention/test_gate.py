"""The gate against its float64 oracle, and what must hold of every choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mobazoo.attention import MoBA, Segments, centroids, route, routing
from tests.factories import Case, chosen_by, gate_routes, inputs, segments_of
from tests.marks import DTYPES, name_of
from tests.oracle import candidates, gate, layout

pytestmark = pytest.mark.usefixtures("loops")

# Queries per case: enough that a share of 0.1 % can be seen.
CASES = {
    "whole": Case(((700,),), 16, 4, 4, 2, 64),
    "packed": Case(((1, 300, -2, 1, 196), (-30, 420, -50)), 16, 3, 4, 2, 33),
    "many_heads": Case(((260,),), 7, 6, 8, 1, 64),
    "block_one": Case(((300,),), 1, 9, 4, 4, 33),
    "chunk": Case(((500,), (-40, 460)), 16, 4, 4, 2, 64, queries=300, first=150),
}
MOST_EXCLUDED = 1e-3


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_equals_the_oracle(name: str, dtype: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    case = CASES[name]
    data = inputs(case, dtype)
    check_choice(case, data.q, data.k, gate_routes(case, data.q, data.k), record_property)


def check_choice(
    case: Case, q: torch.Tensor, k: torch.Tensor, routes: routing.Routes, note: Callable[[str, object], None]
) -> None:
    """Equal to the float64 oracle's but for near-ties, and hardly any of those."""
    got = chosen_by(routes)
    want = gate(q, k, case.rows, case.block_size, case.top_k, case.q_start)
    total = excluded = 0
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        answer = want[b][h][t]
        total += 1
        if answer.decided:
            assert got[b][h][t] == answer.chosen, (b, h, t)
        else:
            excluded += 1
            assert len(got[b][h][t]) == len(answer.chosen)
    note("excluded share", excluded / total)
    assert excluded <= MOST_EXCLUDED * total, f"{excluded} of {total} choices are near-ties"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("top_k", [1, 2, 5, 1000])
def test_invariants(name: str, top_k: int) -> None:
    case = replace(CASES[name], top_k=top_k)
    data = inputs(case)
    check_invariants(case, gate_routes(case, data.q, data.k))


def check_invariants(case: Case, routes: routing.Routes) -> None:
    """Only candidates, each once, as many as there are up to ``top_k - 1``, empty slots last."""
    assert routes.index.shape == (len(case.rows), case.hq, case.length, case.top_k - 1)
    assert routes.index.dtype == torch.int16
    assert not routes.index.requires_grad
    chosen = chosen_by(routes)
    filled = (routes.index >= 0).sum(-1)
    first_empty = (routes.index < 0).int().cumsum(-1)
    assert ((first_empty == 0).sum(-1) == filled).all(), "an empty slot stands before a block"
    for b, row in enumerate(case.rows):
        slots = layout(row)
        for t in range(case.length):
            allowed = candidates(slots, case.q_start + t, case.block_size)
            for h in range(case.hq):
                assert chosen[b][h][t] <= set(allowed)
                assert len(chosen[b][h][t]) == filled[b, h, t] == min(len(allowed), case.top_k - 1)


def test_best_score_first() -> None:
    """Where more blocks compete than may be read; who reads all of them has the latest first."""
    case = CASES["whole"]
    data = inputs(case)
    routes = gate_routes(case, data.q, data.k)
    mean = centroids(data.k, 16, segments_of(case.rows)).mean.repeat_interleave(2, 1)
    scores = (data.q @ mean.mT).gather(-1, routes.index.clamp(min=0).long())
    competing = torch.arange(routes.index.shape[2]) // 16 > routes.index.shape[3]
    assert competing.any()
    assert not competing.all()
    ranked = scores[:, :, competing]
    assert (ranked[..., :-1] >= ranked[..., 1:] - 1e-4).all()
    assert (ranked[..., :-1] > ranked[..., 1:]).any()
    latest = routes.index[:, :, ~competing]
    assert ((latest[..., :-1] > latest[..., 1:]) | (latest[..., 1:] == -1)).all()


@pytest.mark.parametrize("blocks, dtype", [(32767, torch.int16), (32768, torch.int32)])
def test_index_dtype(blocks: int, dtype: torch.dtype) -> None:
    """int16 as long as every block number fits; the last block is found either way."""
    k = torch.zeros(1, 1, blocks, 2)
    k[:, :, blocks - 2, 0] = 1.0
    q = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    segments = Segments.single(1, blocks)
    index = route(q, centroids(k, 1, segments), MoBA(1, 2), segments).index
    assert index.dtype == dtype
    assert index.flatten().tolist() == [blocks - 2]


@pytest.mark.parametrize("where", ["queries", "keys", "both"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_never_leaves_the_range(where: str, value: float) -> None:
    """Which blocks win then is nobody's business; that they are candidates, each once, is the kernels'."""
    case = CASES["packed"]
    data = inputs(case)
    spots = torch.rand(data.q.shape[2:], generator=torch.Generator().manual_seed(1)) < 0.01
    q = torch.where(spots, value, data.q) if where != "keys" else data.q
    k = torch.where(spots, value, data.k) if where != "queries" else data.k
    check_invariants(case, gate_routes(case, q, k))
    everywhere = torch.full_like(data.q, value)
    check_invariants(case, gate_routes(case, everywhere, k))


def test_no_gradient_through_the_gate() -> None:
    case = replace(CASES["whole"], rows=((60,),))
    data = inputs(case)
    q, k = data.q.requires_grad_(), data.k.requires_grad_()
    routes = gate_routes(case, q, k)
    assert not routes.index.requires_grad
    assert routes.index.grad_fn is None


def test_block_grid_restarts_at_each_document() -> None:
    """A document's routes do not depend on where in a row it stands."""
    alone = Case(((150,),), 16, 3)
    data = inputs(alone)
    want = chosen_by(gate_routes(alone, data.q, data.k))
    for before in (1, 5, 16, 23):
        case = replace(alone, rows=((before, 150, -3),))
        wide = inputs(case)
        wide.q[:, :, before : before + 150] = data.q
        wide.k[:, :, before : before + 150] = data.k
        got = chosen_by(gate_routes(case, wide.q, wide.k))[0]
        moved = [[{s - before for s in slots} for slots in head[before : before + 150]] for head in got]
        assert moved == want[0]


def test_hand_worked_example() -> None:
    """Two documents, blocks of 2: scores 3, 1, 2 for the first document's blocks, its 4th block is the own one."""
    k = torch.tensor([3.0, 3, 1, 1, 2, 2, 0, 0, 9, 9, 9]).view(1, 1, 11, 1)
    q = torch.ones(1, 1, 11, 1)
    segments = Segments.from_lengths([[8, 3]])
    index = route(q, centroids(k, 2, segments), MoBA(2, 3), segments).index[0, 0].tolist()
    none = [-1, -1]
    assert index == [none, none, [0, -1], [0, -1], [1, 0], [1, 0], [0, 2], [0, 2], none, none, [4, -1]]
