"""Sparse decoding reads its blocks and nothing else, in place or gathered, a part at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mobazoo.attention import Full, MoBA, Routes, Segments, attend, centroids, route
from mobazoo.attention.backends import decode as backend
from mobazoo.attention.kernels import decode as kernel
from mobazoo.errors import UnsupportedError
from tests.factories import Case, gate_routes, inputs, random_routes, run, spy

LONG = Case(((96,), (-13, 83)), block_size=8, top_k=3, hq=6, hkv=2, dim=16, queries=1)


def read(case: Case, routes: Routes) -> Tensor:
    """Bool ``[B, Hkv, S]``: what the queries of a case may read of each key head."""
    group = case.hq // case.hkv
    mask = torch.zeros(len(case.rows), case.hkv, case.slots, dtype=torch.bool)
    begins = [max(0, -row[0]) for row in case.rows]
    for b, begin in enumerate(begins):
        for h in range(case.hq):
            for t in range(case.length):
                slot = case.q_start + t
                own = slot - (slot - begin) % case.block_size
                mask[b, h // group, own : slot + 1] = True
                for n in routes.index[b, h, t].tolist():
                    if n >= 0:
                        first = int(routes.start[b, n])
                        mask[b, h // group, first : first + case.block_size] = True
    return mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries, first", [(1, None), (3, None), (2, 50)])
def test_nothing_else_of_the_cache_is_touched(dtype: torch.dtype, queries: int, first: int | None) -> None:
    case = Case(**{**vars(LONG), "queries": queries, "first": first})
    data = inputs(case, dtype)
    routes = gate_routes(case, data.q, data.k)
    want = run(case, data, "decode", routes=routes).out
    allowed = read(case, routes)
    most = 1 + (case.hq // case.hkv) * (case.top_k - 1)
    if queries == 1:
        assert int(allowed.sum(-1).max()) <= most * case.block_size
    assert not allowed.all()
    poisoned = [torch.where(allowed[..., None], x, torch.nan) for x in (data.k, data.v)]
    got = run(case, type(data)(data.q, *poisoned, data.dout), "decode", routes=routes).out
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_any_size_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(((40,), (-3, 37)), queries=5)
    data = inputs(case, dtype)
    routes, _ = random_routes(case)
    want = run(case, data, "decode", routes=routes).out
    monkeypatch.setattr(kernel, "_NUMBERS", 1)
    monkeypatch.setitem(kernel._GATHER_BYTES, "cpu", 1)
    parts = spy(monkeypatch, kernel, "_sampled" if dtype == torch.float32 else "_gathered", lambda a, _: a[0].shape[0])
    got = run(case, data, "decode", routes=routes).out
    assert parts == [1] * (2 * case.hq * 5)
    assert float((got - want).abs().max()) <= 1e-6 * (1 if dtype == torch.float32 else 1e4)


def test_views_of_a_cache_are_read_where_they_lie() -> None:
    """Room to spare behind the tokens, and heads side by side as a projection leaves them."""
    q, buffer = torch.randn(2, 4, 1, 16), torch.full((2, 2, 90, 16), torch.nan)
    buffer[:, :, :64] = torch.randn(2, 2, 64, 16)
    k = buffer[:, :, :64]
    other = k.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.randn(2, 2, 64, 20)[..., :16].copy_(k)
    pattern, want = MoBA(8, 3), None
    for keys in (k, other, odd):
        segments = Segments.single(2, 64)
        routes = route(q, centroids(k.contiguous(), 8, segments), pattern, segments)
        got = attend(q, keys, keys, pattern=pattern, routes=routes, backend="decode")
        want = got if want is None else want
        assert torch.equal(got, want)
    assert want is not None
    assert want.isfinite().all()


def test_what_it_cannot_do() -> None:
    q = torch.randn(1, 2, 1, 16, requires_grad=True)
    k = torch.randn(1, 2, 32, 16)
    with pytest.raises(UnsupportedError, match="decode has no backward"):
        attend(q, k, k, pattern=MoBA(8, 2), backend="decode")


def test_full_attention_is_that_of_sdpa() -> None:
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 32, 16)
    for pattern in (Full(), MoBA(8, 4)):
        assert torch.equal(attend(q, k, k, pattern=pattern, backend="decode"), attend(q, k, k, backend="sdpa"))


def test_more_entries_than_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty entries of a short cache outnumber its keys: they are gathered, a part at a time."""
    monkeypatch.setitem(kernel._GATHER_BYTES, "cpu", 1)
    parts = spy(monkeypatch, kernel, "_gathered", lambda given, _: given[0].shape[0])
    case = Case(((20,),), block_size=4, top_k=12, queries=2)
    data = inputs(case)
    routes, _ = random_routes(case)
    want = run(case, data, "reference", routes=routes).out
    assert float((run(case, data, "decode", routes=routes).out - want).abs().max()) <= 1e-5
    assert parts == [1] * (case.hq * 2)


def test_one_graph_with_a_position_of_the_device() -> None:
    k = torch.randn(1, 2, 64, 16)
    segments = Segments.single(1, 64)
    known = centroids(k, 8, segments)
    seen: list[Any] = []

    def step(q: Tensor, at: Tensor) -> Tensor:
        routes = route(q, known, MoBA(8, 3), segments, at)
        return attend(q, k, k, pattern=MoBA(8, 3), routes=routes, q_start=at, segments=segments, backend="decode")

    def count(graph: Any, _: Any) -> Any:
        seen.append(graph)
        return graph

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for at in (3, 30, 63):
        q = torch.randn(1, 4, 1, 16)
        assert torch.equal(compiled(q, torch.tensor(at)), step(q, torch.tensor(at)))
    assert len(seen) == 1
    assert backend.FEW >= 1
