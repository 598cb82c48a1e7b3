"""The gate's compiled code, whatever multiplies, against float64 scores sorted in Python."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mobazoo.attention.native import arguments, gate, library
from mobazoo.attention.native.arguments import BFLOAT16, BFLOAT16_BY_FLOAT32, BFLOAT16_BY_VECTORS
from tests.factories import ranked

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")

ARITHMETIC = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, BFLOAT16),
    "bfloat16_by_vectors": (torch.bfloat16, BFLOAT16_BY_VECTORS),
    "bfloat16_by_float32": (torch.bfloat16, BFLOAT16_BY_FLOAT32),
    "float16": (torch.float16, None),
    "float64": (torch.float64, None),
}


@pytest.fixture(params=ARITHMETIC)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    dtype, by = ARITHMETIC[request.param]
    if by is not None:
        monkeypatch.setitem(arguments.ARITHMETIC, dtype, by)
    return dtype


class Shape(NamedTuple):
    batch: int
    hkv: int
    group: int
    tokens: int
    blocks: int
    dim: int


# Fewer blocks than a vector holds, more than are laid out at once, queries that fill no vector and several tiles.
SHAPES = {
    "small": Shape(1, 1, 1, 1, 60, 8),
    "odd": Shape(2, 2, 3, 37, 101, 33),
    "tiles": Shape(1, 2, 2, 150, 64, 64),
    "parts": Shape(1, 1, 2, 70, 1300, 4),
}
READS = (1, 2, 3, 7, 8, 15, 16, 20, 49)


def numbers(kind: str, *shape: int) -> Tensor:
    """Small integers, whose products are exact in any order and dtype, so that ties are ties everywhere."""
    torch.manual_seed(sum(shape))
    most = {"normal": 9, "ties": 2, "zeros": 1}.get(kind, 3)
    x = torch.randint(-most, most + 1, shape).float()
    if kind == "zeros":
        return x * torch.tensor(-0.0)
    if kind == "extremes":  # in one number of each query and block, so that their product decides
        some = torch.tensor([-torch.inf, -1e38, -1.0, -0.0, 0.0, 1.0, 1e38, torch.inf, torch.nan])
        x.zero_()[..., 0] = some[torch.randint(0, len(some), shape[:-1])]
    return x


def ranges(shape: Shape) -> tuple[Tensor, Tensor]:
    """Ranges that begin and end anywhere, and do not decrease; rows of a batch differ."""
    t = torch.arange(shape.tokens).expand(shape.batch, -1) + 5 * torch.arange(shape.batch)[:, None]
    first = (t // 9 * 5).clamp(max=shape.blocks // 2)
    stop = (t * max(3, shape.blocks // shape.tokens) + 3).clamp(max=shape.blocks)
    if shape.tokens == 1:
        stop = torch.full_like(stop, shape.blocks)
    return torch.minimum(first, stop), stop


def wanted(q: Tensor, mean: Tensor, first: Tensor, stop: Tensor, k: int) -> list[list[int]]:
    scores = (q.double() @ mean.double().repeat_interleave(q.shape[1] // mean.shape[1], 1).mT).tolist()
    rows = []
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).view(-1, 3).tolist():
        allowed = range(int(first[b, t]), int(stop[b, t]))
        best = ranked(scores[b][h][t], allowed)[:k] if len(allowed) > k else list(reversed(allowed))
        rows.append(best + [-1] * (k - len(best)))
    return rows


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "extremes"])
@pytest.mark.parametrize("name", SHAPES)
def test_chooses_as_sorting_would(name: str, kind: str, dtype: torch.dtype) -> None:
    """With nothing written beside the index."""
    shape = SHAPES[name]
    if kind == "extremes" and dtype == torch.float16:
        pytest.skip("has no number as large")
    q = numbers(kind, shape.batch, shape.tokens, shape.hkv * shape.group, shape.dim).to(dtype).transpose(1, 2)
    mean = numbers(kind, shape.batch, shape.hkv, shape.blocks, shape.dim).to(dtype)
    first, stop = ranges(shape)
    for k in READS:
        kept = torch.full((*q.shape[:2], shape.tokens + 2, k), -7, dtype=torch.int32 if k % 2 else torch.int16)
        gate.choose(q, mean, first, stop, kept[:, :, 1:-1])
        assert (kept[:, :, [0, -1]] == -7).all()
        assert kept[:, :, 1:-1].flatten(0, 2).tolist() == wanted(q, mean, first, stop, k), k


def test_scores_are_of_float32(dtype: torch.dtype) -> None:
    """Random numbers: what is chosen is the best but for the rounding of a sum in float32."""
    torch.manual_seed(1)
    q, mean = torch.randn(2, 4, 130, 128).to(dtype), torch.randn(2, 2, 700, 128).to(dtype)
    stop = torch.arange(570, 700).expand(2, -1)
    index = torch.empty(2, 4, 130, 7, dtype=torch.int16)
    gate.choose(q, mean, torch.zeros_like(stop), stop, index)
    scores = q.double() @ mean.double().repeat_interleave(2, 1).mT
    scores = scores.masked_fill(torch.arange(700) >= stop[:, None, :, None], -torch.inf)
    torch.testing.assert_close(scores.gather(3, index.long()), scores.topk(7).values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_take_every_piece_once(threads: int) -> None:
    shape = Shape(3, 2, 2, 1500, 40, 16)
    q, mean = numbers("ties", 3, 4, 1500, 16), numbers("ties", 3, 2, 40, 16)
    first, stop = torch.zeros(1, 1, dtype=torch.int64).expand(3, 1500), (torch.arange(1500) // 37).expand(3, -1)
    want = torch.tensor(wanted(q, mean, first, stop, 3)).view(3, 4, 1500, 3)
    index = torch.full((3, 4, 1500, 3), -7, dtype=torch.int16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gate.choose(q, mean, first, stop, index)
    finally:
        torch.set_num_threads(before)
    assert shape.tokens * shape.group * shape.hkv > 512 * threads, "one piece"
    assert torch.equal(index.long(), want)


def test_widened_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, mean = numbers("normal", 2, 4, 90, 8), numbers("normal", 2, 2, 30, 8)
    first, stop = ranges(Shape(2, 2, 2, 90, 30, 8))
    want, got = (torch.empty(2, 4, 90, 5, dtype=torch.int16) for _ in range(2))
    gate.choose(q, mean, first, stop, want)
    monkeypatch.setattr(gate, "_WIDE", 2048)
    gate.choose(q.double(), mean.double(), first, stop, got)
    assert torch.equal(got, want)


def test_says_when_memory_is_short() -> None:
    """More places for each query than any machine can hold, of which nothing is touched."""
    q, mean = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 1 << 50, 8)
    span = torch.zeros(1, 4, dtype=torch.int64)
    index = torch.empty(1, dtype=torch.int16).expand(1, 1, 4, 1 << 49)
    with pytest.raises(MemoryError, match="fewer threads"):
        gate.choose(q, mean, span, span, index)
