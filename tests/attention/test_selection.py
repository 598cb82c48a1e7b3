"""The best-scoring blocks of many queries by torch's operators, against plain sorting in Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobazoo.attention import selection
from mobazoo.attention.selection import RUN, choose, largest
from tests.factories import ranked, spy

WIDTHS = (4, 8, 12, 28, 64, 68, 100, 132, 256, 516)
MOST = torch.finfo(torch.float32).max


def scores_of(kind: str, *shape: int) -> Tensor:
    torch.manual_seed(sum(shape))
    if kind == "normal":
        return torch.randn(shape)
    if kind == "extremes":
        some = torch.tensor([-torch.inf, -MOST, -1.0, -1e-42, 0.0, 1e-42, 1.0, MOST, torch.inf, torch.nan])
        return some[torch.randint(0, len(some), shape)]
    return torch.randint(-2, 3, shape).float() * torch.tensor(-0.0 if kind == "zeros" else 1.0)


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "extremes"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 11, 12, 15, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
def test_chooses_as_sorting_would(kind: str, k: int, dtype: torch.dtype) -> None:
    """Ranges that begin and end anywhere, queries of two key heads with three each.

    Nothing but the places of queries that have a choice is written.
    """
    for blocks, queries in ((max(12, k + -k % 4), 1), (64, 21), (132, 37)):
        scores = scores_of(kind, 2, blocks, 3, queries)
        first = torch.arange(queries) // 9
        stop = (first + 1 + torch.arange(queries) * 3).clamp(max=blocks)
        index = torch.full((2, 3, queries + 2, k), -7, dtype=dtype)
        apart = torch.stack([first, stop], 1)  # ranges that do not lie together in memory
        choose(scores.clone(), apart[:, 0], apart[:, 1], 100, index[:, :, 1:-1])
        assert (index[:, :, [0, -1]] == -7).all()
        for h, g, t in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(queries)).tolist():
            got, numbers = index[h, g, t + 1].tolist(), range(int(first[t]), int(stop[t]))
            if len(numbers) > k:
                assert got == [100 + n for n in ranked(scores[h, :, g, t].tolist(), numbers)[:k]], (blocks, t)
            else:
                assert got == [-7] * k, (blocks, t)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
def test_torch_sorts_in_one_round_or_two(n: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_ONE_ROUND", 32)
    scores = scores_of(kind, 2, n, 5)
    rows = scores.mT.flatten(0, 1).tolist()
    for k in (1, 2, 3, 5, 7, 8, 9, 16, 17, 40):
        if k > n:
            break
        assert largest(scores.clone(), k).mT.flatten(0, 1).tolist() == [ranked(row, range(n))[:k] for row in rows], k


def test_above_a_width_there_are_two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_ONE_ROUND", 32)
    rounds = spy(monkeypatch, selection, "_first", lambda *_: 1)
    largest(torch.randn(1, 32, 5), 3)
    assert len(rounds) == 1
    largest(torch.randn(1, 32 + RUN, 5), 3)
    assert len(rounds) == 3


def test_keys_order_as_floats_do() -> None:
    """The high word of a key alone: zero and minus zero are one number, everything else keeps its order."""
    infinity, tiny = float("inf"), torch.finfo(torch.float32).smallest_normal
    ascending = [-infinity, -3e38, -1.0, -tiny, -tiny / 4, 0.0, tiny / 4, tiny, 1.0, 3e38, infinity]

    def words(scores: list[float]) -> list[int]:
        number = torch.zeros(1, dtype=torch.int64)
        return (selection._keys(torch.tensor(scores)[None, :, None], number) >> 32).flatten().tolist()

    assert words(ascending) == sorted(set(words(ascending)))
    assert words([-0.0, 0.0]) == [words(ascending)[5]] * 2
