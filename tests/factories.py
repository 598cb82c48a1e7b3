"""Attention problems to test with: geometry as signed lengths, inputs from a seed, routes that no gate chose."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mobazoo.attention import Full, MoBA, Pattern, Routes, Segments, attend
from mobazoo.attention.blocks import centroids_by
from mobazoo.attention.problem import Problem
from mobazoo.attention.routing import route_by
from tests.oracle import Attention, Chosen, candidates, layout, read_mask
from tests.tolerance import Result


@dataclass(frozen=True)
class Case:
    """One problem; ``rows`` are signed lengths as in ``tests.oracle``, all of one sum. ``block_size`` 0 is full."""

    rows: tuple[tuple[int, ...], ...]
    block_size: int = 7
    top_k: int = 3
    hq: int = 4
    hkv: int = 2
    dim: int = 64
    queries: int | None = None
    first: int | None = None

    @property
    def slots(self) -> int:
        return sum(map(abs, self.rows[0])) if self.rows else 0

    @property
    def length(self) -> int:
        return self.slots if self.queries is None else self.queries

    @property
    def q_start(self) -> int:
        return self.slots - self.length if self.first is None else self.first

    @property
    def pattern(self) -> Pattern:
        return MoBA(self.block_size, self.top_k) if self.block_size else Full()

    @property
    def full(self) -> Case:
        """The same problem with full attention."""
        return replace(self, block_size=0)

    def problem(self, dtype: torch.dtype = torch.float32, device: str = "cpu", *, grad: bool = False) -> Problem:
        """What ``attend`` asks a backend when it is given this case with routes."""
        whole = all(row == (self.slots,) for row in self.rows)
        return Problem(self.pattern, device, dtype, self.dim, grad, self.length, self.slots, whole)


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def map(self, change: Any) -> Inputs:
        return Inputs(*(change(x) for x in (self.q, self.k, self.v, self.dout)))


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
    """Normal random q, k, v and output gradient, the same numbers on every device."""
    random_numbers = torch.Generator().manual_seed(seed)

    def normal(heads: int, length: int) -> Tensor:
        shape = (len(case.rows), heads, length, case.dim)
        return torch.randn(shape, generator=random_numbers, dtype=torch.float64).to(device, dtype)

    query, key = (case.hq, case.length), (case.hkv, case.slots)
    return Inputs(normal(*query), normal(*key), normal(*key), normal(*query))


def segments_of(rows: tuple[tuple[int, ...], ...], device: str = "cpu") -> Segments:
    """Built slot by slot, so that no constructor of the library is trusted."""
    slots = [layout(row) for row in rows]
    doc = torch.tensor([[-1 if s is None else s[0] for s in row] for row in slots], dtype=torch.int32)
    pos = torch.tensor([[0 if s is None else s[1] for s in row] for row in slots], dtype=torch.int32)
    documents = [[n for n in row if n > 0] for row in rows]
    length = len(slots[0]) if slots else 0
    return Segments(
        doc.view(len(rows), length).to(device),
        pos.view(len(rows), length).to(device),
        max_docs=max(map(len, documents), default=0),
        max_len=max((n for row in documents for n in row), default=0),
        whole=length > 0 and all(tuple(row) == (length,) for row in rows),
    )


@cache
def random_routes(case: Case, seed: int = 0) -> tuple[Routes, Chosen]:
    """Allowed blocks at random, in random order with empty slots anywhere, and the same as first slots of blocks.

    About half of the queries take all they may, as a gate would; the others fewer.
    """
    dice = random.Random(seed)
    wide = case.slots // case.block_size
    layouts = [layout(row) for row in case.rows]
    starts = []
    for slots in layouts:
        found = sorted({s for slot in range(len(slots)) for s in candidates(slots, slot, case.block_size)})
        # The last complete block of a document is nobody's candidate, but a table lists it: any order-keeping table
        # of blocks is a legal one, so this one lists candidates only.
        starts.append(found + [-1] * (wide - len(found)))
    index = torch.full((len(case.rows), case.hq, case.length, case.top_k - 1), -1, dtype=torch.int32)
    chosen: Chosen = [[[set() for _ in range(case.length)] for _ in range(case.hq)] for _ in case.rows]
    for b, slots in enumerate(layouts):
        column = {s: n for n, s in enumerate(starts[b])}
        for t in range(case.length):
            allowed = candidates(slots, case.q_start + t, case.block_size)
            for h in range(case.hq):
                most = min(len(allowed), case.top_k - 1)
                taken = dice.sample(allowed, dice.choice((most, dice.randint(0, most))))
                places = dice.sample(range(case.top_k - 1), len(taken))
                for place, start in zip(places, taken, strict=True):
                    index[b, h, t, place] = column[start]
                chosen[b][h][t] = set(taken)
    table = torch.tensor(starts, dtype=torch.int32).view(len(case.rows), wide)
    return Routes(index.to(torch.int16) if seed % 2 else index, table, case.block_size), chosen


def gate_routes(case: Case, q: Tensor, k: Tensor, segments: Segments | None = None, by: str = "torch") -> Routes:
    """The library's own choice."""
    assert isinstance(case.pattern, MoBA)
    segments = segments_of(case.rows, str(k.device)) if segments is None else segments
    return route_by(by, q, centroids_by(by, k, case.block_size, segments), case.pattern, segments, case.q_start)


def ranked(scores: Sequence[float], numbers: Iterable[int]) -> list[int]:
    """Numbers by falling score, the higher one first among equals; what is no number is the lowest."""
    most = torch.finfo(torch.float32).max

    def score(number: int) -> float:
        given = scores[number]
        return max(-most, min(most, given)) if given == given else -most

    return sorted(numbers, key=lambda number: (score(number), number), reverse=True)


def chosen_by(routes: Routes) -> Chosen:
    """``Routes`` as first slots of blocks, so that two block tables can be compared."""
    index, table = routes.index.tolist(), routes.start.tolist()
    return [[[{table[b][n] for n in slots if n >= 0} for slots in head] for head in row] for b, row in enumerate(index)]


def routes_on(routes: Routes, device: str) -> Routes:
    return replace(routes, index=routes.index.to(device), start=routes.start.to(device))


def oracle(case: Case, data: Inputs, chosen: Chosen | None = None, scale: float | None = None) -> Attention:
    """Truth for a case: full attention, or MoBA over the chosen blocks."""
    mask = read_mask(case.rows, case.hq, case.length, case.q_start, case.block_size or None, chosen or [])
    q, k, v, dout = (x.detach().cpu() for x in (*data.qkv, data.dout))
    return Attention(q, k, v, mask, case.dim**-0.5 if scale is None else scale, dout)


def run(
    case: Case,
    data: Inputs,
    backend: str,
    *,
    routes: Routes | None = None,
    grad: bool = False,
    scale: float | None = None,
    segments: Segments | None = None,
    q_start: int | Tensor | None = None,
) -> Result:
    """``attend`` on a case, with its backward where asked."""
    device = str(data.q.device)
    leaves = [x.detach().requires_grad_(grad) for x in data.qkv]
    out = attend(
        *leaves,
        pattern=case.pattern,
        backend=backend,
        segments=segments_of(case.rows, device) if segments is None else segments,
        routes=None if routes is None else routes_on(routes, device),
        q_start=case.q_start if q_start is None else q_start,
        scale=scale,
    )
    return Result(out.detach(), torch.autograd.grad(out, leaves, data.dout) if grad else ())


def documents(rows: tuple[tuple[int, ...], ...]) -> list[tuple[int, slice]]:
    """``(row, slots)`` of every document."""
    found = []
    for b, row in enumerate(rows):
        slot = 0
        for length in row:
            if length > 0:
                found.append((b, slice(slot, slot + length)))
            slot += abs(length)
    return found


def padding(rows: tuple[tuple[int, ...], ...]) -> Tensor:
    """Bool ``[B, S]``, true at padding."""
    return torch.tensor([[slot is None for slot in layout(row)] for row in rows])


def at_slots(data: Inputs, row: int, slots: slice) -> Inputs:
    """The inputs of one stretch of one row, as a row of its own."""
    return data.map(lambda x: x[row : row + 1, :, slots])


def spy(monkeypatch: Any, owner: Any, name: str, seen: Any) -> list[Any]:
    """Replaces ``owner.name`` by itself and a note of what ``seen(arguments, result)`` says of every call."""
    real, notes = getattr(owner, name), []

    def noted(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        notes.append(seen(args, result))
        return result

    monkeypatch.setattr(owner, name, noted)
    return notes
