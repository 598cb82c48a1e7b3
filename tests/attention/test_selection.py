"""The largest scores of many queries, against plain sorting in Python."""

from __future__ import annotations

import pytest
import torch

from mobazoo.attention import selection
from mobazoo.attention.selection import RUN, largest
from tests.factories import spy

WIDTHS = (4, 8, 12, 28, 64, 68, 100, 132, 256, 516)


@pytest.fixture(params=["network", "top-k"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Few queries are as good as many for a test, and one round for few scores as good as two."""
    monkeypatch.setattr(selection, "_LEAST_QUERIES", 1 if request.param == "network" else 1 << 30)
    monkeypatch.setattr(selection, "_ONE_ROUND", 32)
    return str(request.param)


def scores_of(kind: str, shape: tuple[int, int, int]) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    if kind == "normal":
        return torch.randn(shape)
    return torch.randint(-2, 3, shape).float() * torch.tensor(-0.0 if kind == "zeros" else 1.0)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
def test_as_sorting_would(n: int, kind: str, how: str) -> None:
    scores = scores_of(kind, (2, n, 5))
    rows = scores.mT.flatten(0, 1).tolist()
    for k in (1, 2, 3, 5, 7, 8, 9, 16, 17, 40):
        if k > n:
            break
        want = [[i for _, i in sorted(zip(row, range(n), strict=True), reverse=True)[:k]] for row in rows]
        assert largest(scores.clone(), k).mT.flatten(0, 1).tolist() == want, (how, k)


def test_both_ways_are_tried(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network compares what topk would select, and above a width there are two rounds."""
    sorts = spy(monkeypatch, selection, "_sort", lambda *_: 1)
    rounds = spy(monkeypatch, selection, "_first", lambda *_: 1)
    largest(torch.randn(1, 32, 5), 3)
    assert len(rounds) == 1
    largest(torch.randn(1, 32 + RUN, 5), 3)
    assert len(rounds) == 3
    assert len(sorts) == (3 if how == "network" else 0)


def test_all_infinities_and_extremes(how: str) -> None:
    """Minus infinity is below the lowest number, and what fills lists up is below both."""
    most = torch.finfo(torch.float32).max
    column = [-torch.inf, -most, -torch.inf, most, torch.inf, -most, 0.0, -torch.inf]
    scores = torch.tensor(column)[None, :, None]
    assert largest(scores.clone(), 8).flatten().tolist() == [4, 3, 6, 5, 1, 7, 2, 0]
    assert largest(torch.full((1, 12, 3), -torch.inf), 5)[0, :, 1].tolist() == [11, 10, 9, 8, 7]


def test_keys_order_as_floats_do() -> None:
    """The high word of a key alone: zero and minus zero are one number, everything else keeps its order."""
    infinity, tiny = float("inf"), torch.finfo(torch.float32).smallest_normal
    ascending = [-infinity, -3e38, -1.0, -tiny, -tiny / 4, 0.0, tiny / 4, tiny, 1.0, 3e38, infinity]

    def words(scores: list[float]) -> list[int]:
        number = torch.zeros(1, dtype=torch.int64)
        return (selection._keys(torch.tensor(scores)[None, :, None], number, 1) >> 32).flatten().tolist()

    assert words(ascending) == sorted(set(words(ascending)))
    assert words([-0.0, 0.0]) == [words(ascending)[5]] * 2
