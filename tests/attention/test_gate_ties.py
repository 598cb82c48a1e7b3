"""Equal scores fall to the most recent block, at every width and however the work is cut into chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mobazoo.attention import MoBA, Segments, centroids, routing, selection
from mobazoo.attention.native import build
from mobazoo.attention.routing import _Room, route_by
from tests.factories import Case, gate_routes, inputs, segments_of, spy

pytestmark = pytest.mark.usefixtures("loops")

BLOCK = 4


def routed(
    scores: list[float], top_k: int, *, copies: int = 1, sign: float = 1.0, by: str = "torch", device: str = "cpu"
) -> list[int]:
    """The choice of one query, in a last block of its own, over blocks of the given scores."""
    keys = torch.tensor([*scores, 0.0], device=device).repeat_interleave(BLOCK).view(1, 1, -1, 1) * sign
    segments = Segments.single(1, keys.shape[2], device)
    q = torch.full((1, copies, 1, 1), sign, device=device)
    index = route_by(by, q, centroids(keys, BLOCK, segments), MoBA(BLOCK, top_k), segments).index
    assert (index == index[:, :1]).all()
    return index[0, 0, 0].tolist()


WIDTHS = (1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 100, 255, 256, 257, 1000, 1025, 3000)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5])
def test_all_equal_takes_the_last_ones(width: int, value: float) -> None:
    for top_k in {2, 3, 9, width, width + 5} - {1}:
        latest_first = list(range(width - 1, -1, -1))[: top_k - 1]
        assert routed([value] * width, top_k) == latest_first + [-1] * (top_k - 1 - len(latest_first))


@pytest.mark.parametrize("width", WIDTHS[3:])
@pytest.mark.parametrize("top_k", [2, 4, 6])
def test_tie_at_the_cut(width: int, top_k: int) -> None:
    """One block is better; the places left go to the most recent of many equals. Without a cut nothing is ranked."""
    scores = [1.0] * width
    scores[1] = 5.0
    latest_first = list(range(width - 1, -1, -1))
    ranked = [1, *(n for n in latest_first if n != 1)][: top_k - 1]
    wanted = ranked if width >= top_k else latest_first
    assert [n for n in routed(scores, top_k) if n >= 0] == wanted


def test_negative_zero_equals_zero() -> None:
    assert routed([0.0, -0.0, 0.0, -0.0], 3) == [3, 2]
    assert routed([-0.0, 0.0, -0.0], 3, sign=-1.0) == [2, 1]
    assert routed([-0.0, -1.0, -3.0], 2) == [0]


def test_order_of_signed_scores() -> None:
    """Sorting floats by their bits must keep the order across signs, exponents and the smallest numbers."""
    scores = [-1e30, -1.0, -1e-38, 0.0, 1e-38, 1.0, 1.0000001, 1e30]
    for shuffle in range(20):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(shuffle)).tolist()
        ranked = [order.index(n) for n in range(7, -1, -1)]
        assert routed([scores[n] for n in order], 8) == ranked[:7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_queries_and_equal_keys(dtype: torch.dtype) -> None:
    """A padding token's query can be exactly zero, and repeated text repeats its keys."""
    case = Case(((130,),), 8, 4, 4, 2, 64)
    data = inputs(case, dtype)
    latest = [list(range(t // 8 - 1, -1, -1))[:3] for t in range(130)]
    latest = [row + [-1] * (3 - len(row)) for row in latest]
    same_keys = data.k[:, :, :8].repeat(1, 1, 17, 1)[:, :, :130]
    for q, k in ((torch.zeros_like(data.q), data.k), (data.q, same_keys)):
        index = gate_routes(case, q, k).index
        assert (index == torch.tensor(latest)).all()


@pytest.fixture(params=["cpu", "other device"])
def _tiny_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torch's operators work in many chunks, by the branch of a CPU or of a device whose values are not read."""
    monkeypatch.setattr(build, "_library", lambda: None)
    monkeypatch.setattr(_Room, "of", lambda _: _Room(100_000, 16))
    if request.param != "cpu":
        pretend_other_device(monkeypatch)


class Elsewhere:
    """A tensor that says it is on another device, whose values the host cannot read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.device, self.dtype = tensor, torch.device("meta"), tensor.dtype

    def __getitem__(self, at: Any) -> Tensor:
        return self.tensor[at]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


def pretend_other_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's code for devices whose values it must not read, run on the CPU."""
    chunks, hide, arange = routing._chunks, selection._hide, torch.arange

    def chunks_elsewhere(first: Any, stop: Any, *rest: Any) -> list[tuple[int, int, int, int]]:
        return chunks(Elsewhere(first), Elsewhere(stop), *rest)  # type: ignore[arg-type]

    def hide_elsewhere(scores: Any, first: Tensor, stop: Tensor) -> None:
        hide(Elsewhere(scores), first, stop)  # type: ignore[arg-type]

    def arange_here(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return arange(*args, **kwargs)

    monkeypatch.setattr(torch, "arange", arange_here)  # for all threads: the gate may use several
    monkeypatch.setattr(routing, "_chunks", chunks_elsewhere)
    monkeypatch.setattr(selection, "_hide", hide_elsewhere)
    monkeypatch.setattr(build, "_library", lambda: None)


CASES = {
    "whole": Case(((400,),), 4, 5, 4, 2, 33),
    "packed": Case(((1, 211, -2, 1, 85), (-30, 220, -50)), 4, 5, 8, 1, 64),
    "chunk": Case(((300,), (-40, 260)), 4, 4, 4, 2, 64, queries=100, first=150),
    "wide": Case(((600,),), 1, 4, 2, 1, 8),
    "all_empty": Case(((3, -20, 3),), 4, 4, 2, 1, 8),
}


@pytest.mark.usefixtures("_tiny_chunks")
@pytest.mark.parametrize("name", CASES)
def test_chunks_choose_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random scores, ties across chunk borders, and all ties: identical tables however the work is cut.

    Scores are small integers, exact in any order of summation, so that chunks of other shapes compute the same bits.
    """
    case = CASES[name]
    data = inputs(case)
    q, k = data.q.sign(), data.k.round()
    k[..., 1:] = 0  # centroids of quarter integers with one component
    counts = spy(monkeypatch, routing, "_chunks", lambda _, result: len(result))
    segments = segments_of(case.rows)
    split = [gate_routes(case, x, k, segments).index for x in (q, torch.zeros_like(q))]
    assert name == "all_empty" or max(counts) > 3, "nothing was split"
    monkeypatch.undo()
    whole = [gate_routes(case, x, k, segments).index for x in (q, torch.zeros_like(q))]
    for a, b in zip(split, whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_other_devices_choose_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch that scores all blocks and reads nothing back, in one chunk."""
    case = CASES[name]
    data = inputs(case)
    k = torch.where(torch.arange(case.dim) > 0, 0.0, data.k.round())
    want = gate_routes(case, data.q.sign(), k).index
    pretend_other_device(monkeypatch)
    assert torch.equal(gate_routes(case, data.q.sign(), k).index, want)


def test_key_heads_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one query's scores of all heads are large, heads are taken a few at a time."""
    case = Case(((100,),), 4, 4, 8, 4, 16)
    data = inputs(case)
    want = gate_routes(case, data.q, data.k).index
    monkeypatch.setattr(build, "_library", lambda: None)
    heads = spy(monkeypatch, routing, "_chunks", lambda arguments, _: arguments[3][0])
    for most in (1, 3):
        heads.clear()
        monkeypatch.setattr(_Room, "of", lambda _, most=most: _Room(25 * (16 * 2 + 4 * 16) * most, 16))
        got = gate_routes(case, data.q, data.k).index
        assert max(heads) <= most
        assert torch.equal(got, want)


@pytest.mark.parametrize("slot", [0, 60, 399])
def test_one_query_alone_chooses_as_in_company(slot: int) -> None:
    """With exact scores: a query's blocks do not depend on the shape of the call."""
    case = CASES["whole"]
    data = inputs(case)
    k = torch.where(torch.arange(case.dim) > 0, 0.0, data.k.round())
    alone = replace(case, queries=1, first=slot)
    want = gate_routes(case, data.q, k).index[:, :, slot : slot + 1]
    assert torch.equal(gate_routes(alone, data.q[:, :, slot : slot + 1], k).index, want)
