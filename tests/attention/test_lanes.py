"""Work spread over threads of ours: every query once, the same results, errors and modes pass through."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from threading import get_ident
from typing import Any

import pytest
import torch

from mobazoo.attention import MoBA, attend, routing
from mobazoo.attention.kernels import cpu_torch
from mobazoo.attention.lanes import Piece, Shares, count, share, spread
from tests.attention.parity.cases import SPARSE
from tests.factories import chosen_by, gate_routes, inputs, oracle, random_routes, run, spy
from tests.tolerance import check

LANES = {1: 1, 2: 2, 3: 3, 20: 10}  # threads of ours, by torch's


@pytest.fixture(params=LANES)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """As many threads of torch's as the machine of the parameter would have."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def shared(by_torch: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No problem is too small for threads of ours, and attention is the schedule that takes them."""
    for name in ("_FORWARD_LEAST", "_BACKWARD_LEAST"):
        monkeypatch.setattr(cpu_torch, name, 1)
    monkeypatch.setattr(routing, "LEAST_QUERIES", 1)


@pytest.mark.parametrize(
    "shape", [(1, 2, 4096), (1, 1, 4096), (3, 1, 4097), (5, 8, 100), (2, 3, 70), (1, 1, 1), (0, 2, 9)]
)
def test_pieces_hold_every_query_once_and_share_evenly(shape: tuple[int, int, int], threads: int) -> None:
    batch, heads, tokens = shape
    over = share(batch, heads, tokens, 16, most=tokens).pieces
    held = Counter(
        (piece.row, head, token)
        for piece in over
        for head in range(piece.heads.start, piece.heads.stop)
        for token in range(piece.tokens.start, piece.tokens.stop)
    )
    assert held == Counter((b, h, t) for b in range(batch) for h in range(heads) for t in range(tokens))
    if batch * heads * tokens >= 16 * threads:
        assert len(over) % LANES[threads] == 0
        assert max(p.tokens.stop - p.tokens.start for p in over) - min(p.tokens.stop - p.tokens.start for p in over) < 2
    assert len(share(batch, heads, tokens, 16, most=1).pieces) <= batch * heads


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("name", ["b7k3", "b100k2", "b64k50", "chunk", "middle", "whole"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_right_in_pieces(name: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SPARSE[name]
    data, (routes, chosen) = inputs(case, dtype), random_routes(case)
    ran = spy(monkeypatch, cpu_torch, "spread", lambda given, _: len(given[1].pieces))
    reference = run(case, data, "reference", routes=routes, grad=True)
    check(run(case, data, "flash", routes=routes, grad=True), oracle(case, data, chosen), reference, "flash")
    assert len(ran) == 2
    assert max(ran) >= min(threads, case.hkv * len(case.rows))


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("name", ["b7k3", "chunk", "whole"])
def test_gate_chooses_the_same_in_pieces(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SPARSE[name]
    data = inputs(case)
    torch.set_num_threads(1)
    alone = chosen_by(gate_routes(case, data.q, data.k))
    torch.set_num_threads(threads)
    cut = spy(monkeypatch, routing, "spread", lambda given, _: len(given[1].pieces))
    assert chosen_by(gate_routes(case, data.q, data.k)) == alone
    assert cut[0] >= min(threads, case.hkv * len(case.rows))


def test_gradients_are_the_same_bits_every_time(shared: None, threads: int) -> None:
    case = SPARSE["whole"]
    data, (routes, _) = inputs(case), random_routes(case)
    first, second = (run(case, data, "flash", routes=routes, grad=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))


def test_every_thread_has_its_share_of_cores_and_torch_keeps_its_own(threads: int) -> None:
    seen: dict[int, int] = {}

    def work(_: Piece) -> None:
        seen[get_ident()] = torch.get_num_threads()

    over = share(4, 4, 64, 1, most=1)
    spread(work, over._replace(pieces=over.pieces * 8))
    lanes = LANES[threads]
    assert set(seen.values()) == {threads // lanes if lanes > 1 else 1}
    assert len(seen) <= lanes
    assert (get_ident() in seen) == (lanes == 1)
    assert torch.get_num_threads() == threads


def test_the_first_error_comes_through_when_all_are_done() -> None:
    done = []

    def work(piece: Piece) -> None:
        if piece.row == 1:
            raise ValueError(f"row {piece.row}")
        done.append(piece.row)

    with pytest.raises(ValueError, match="row 1"):
        spread(work, Shares([Piece(row, slice(0, 1), slice(0, 1), 0) for row in range(6)], 2))
    assert torch.get_num_threads() == 1 or sorted(done) == [0, 2, 3, 4, 5]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_the_caller_hold(mode: type, shared: None) -> None:
    case = SPARSE["whole"]
    data = inputs(case)
    expected = attend(*data.qkv, pattern=MoBA(16, 3), backend="flash")
    with mode():
        leaves = [x.clone().requires_grad_(mode is torch.enable_grad) for x in data.qkv]
        out = attend(*leaves, pattern=MoBA(16, 3), backend="flash")
        assert out.requires_grad == (mode is torch.enable_grad)
        assert out.is_inference() == (mode is torch.inference_mode)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("threads", "lanes", "each"),
    [(16, 16, 1), (17, 16, 1), (24, 12, 2), (31, 10, 3), (32, 16, 2), (48, 16, 3), (64, 16, 4)],
)
def test_threads_beyond_16_are_shared_out(
    threads: int, lanes: int, each: int, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal shares, as few threads left over as can be, and the answer of one thread."""
    case = SPARSE["whole"]
    data, (routes, _) = inputs(case), random_routes(case)
    before = torch.get_num_threads()
    seen: dict[int, int] = {}
    kernel = cpu_torch._forward

    def noted(*given: Any) -> None:
        seen[get_ident()] = torch.get_num_threads()
        kernel(*given)

    monkeypatch.setattr(cpu_torch, "_forward", noted)
    torch.set_num_threads(1)
    alone = run(case, data, "flash", routes=routes, grad=True)
    seen.clear()
    torch.set_num_threads(threads)
    try:
        many = run(case, data, "flash", routes=routes, grad=True)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert count(threads) == lanes
    assert set(seen.values()) == {each}
    assert len(seen) <= lanes
    assert lanes * each > threads - 2
    for a, b in zip(many.tensors, alone.tensors, strict=True):
        torch.testing.assert_close(a, b)


def _child(results: multiprocessing.Queue[int]) -> None:
    seen = set()
    spread(lambda _: seen.add((os.getpid(), get_ident())), share(2, 4, 64, 1, most=1))
    results.put(len(seen))


def test_works_in_a_forked_process(shared: None) -> None:
    spread(lambda _: None, share(2, 4, 64, 1, most=1))  # this process has its threads
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_child, args=(results,))
    child.start()
    assert results.get(timeout=30) >= 1
    child.join(30)
    assert child.exitcode == 0
