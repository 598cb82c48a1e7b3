"""What ``auto`` chooses and says. The table is pinned here so that a change of it is a decision."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from mobazoo.attention import Full, MoBA, api, attend, auto
from mobazoo.attention.backends import BACKENDS
from mobazoo.attention.native import library
from mobazoo.attention.pattern import Pattern
from mobazoo.attention.problem import Problem
from tests.factories import spy

SPARSE = MoBA(16, 3)
LONG = "flash" if library() else "sdpa"  # where there is compiled code


def problem(
    pattern: Pattern,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    queries: int = 64,
    whole: bool = True,
    grad: bool = False,
) -> Problem:
    return Problem(pattern, device, dtype, 64, grad, queries, max(64, queries), whole)


@pytest.mark.parametrize(
    "asked, name",
    [
        (problem(SPARSE), "flash"),
        (problem(SPARSE, dtype=torch.float64), "flash"),
        (problem(SPARSE, dtype=torch.bfloat16, grad=True), "flash"),
        (problem(SPARSE, whole=False), "flash"),
        (problem(SPARSE, queries=1), "decode"),
        (problem(SPARSE, queries=1, grad=True), "flash"),
        (problem(SPARSE, "cuda", queries=1, dtype=torch.bfloat16, whole=False), "decode"),
        (problem(SPARSE, queries=17), "flash"),
        (problem(Full()), "sdpa"),
        (problem(Full(), dtype=torch.float64, grad=True), "sdpa"),
        (problem(Full(), queries=1), "sdpa"),
        (problem(Full(), queries=512), LONG),
        (problem(Full(), queries=512, dtype=torch.bfloat16, grad=True), LONG),
        (problem(Full(), queries=512, dtype=torch.float64), "sdpa"),
        (problem(Full(), "cuda", queries=512, dtype=torch.bfloat16), "sdpa"),
        (problem(Full(), queries=17), "flash"),
        (problem(Full(), whole=False), "flash"),
        (problem(Full(), queries=1, whole=False), "sdpa"),
        (problem(Full(), "cuda", torch.bfloat16, grad=True), "sdpa"),
        (problem(Full(), "cuda", torch.float32), "sdpa"),
        (problem(Full(), "meta", whole=False), "sdpa"),
        (problem(SPARSE, "meta"), "reference"),
    ],
    ids=str,
)
def test_table(asked: Problem, name: str) -> None:
    chosen, why = auto.choose(asked)
    assert chosen == name
    assert why


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", [Full(), SPARSE], ids=str)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("queries", [1, 64])
def test_choice_is_always_able(device: str, dtype: torch.dtype, pattern: Pattern, whole: bool, queries: int) -> None:
    asked = problem(pattern, device, dtype, queries=queries, whole=whole, grad=True)
    chosen, _ = auto.choose(asked)
    assert BACKENDS[chosen].unsupported(asked) is None


def test_every_backend_of_the_table_exists() -> None:
    """Rows may name a backend that only some machines can run, but not one that nobody wrote."""
    assert {name for name, _, _ in auto._TABLE} <= set(BACKENDS)


def fakes(monkeypatch: pytest.MonkeyPatch, able: set[str]) -> None:
    """Backends that support everything or nothing, for the table alone."""
    for name in {"sdpa", "decode", "flash", "flex", "reference"}:
        answer = None if name in able else "no"
        monkeypatch.setitem(BACKENDS, name, SimpleNamespace(unsupported=lambda _, answer=answer: answer))


@pytest.mark.parametrize(
    "able, device, pattern, name",
    [
        ({"sdpa", "flash", "flex", "reference"}, "cuda", SPARSE, "flash"),
        ({"flex", "reference"}, "cuda", SPARSE, "flex"),
        ({"flex", "reference"}, "cpu", SPARSE, "reference"),
        ({"flex", "sdpa", "reference"}, "cuda", Full(), "sdpa"),
        ({"reference"}, "cuda", Full(), "reference"),
    ],
)
def test_order_of_the_table(
    able: set[str], device: str, pattern: Pattern, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes(monkeypatch, able)
    assert auto.choose(problem(pattern, device))[0] == name


def test_nothing_able_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes(monkeypatch, set())
    with pytest.raises(AssertionError, match="the reference backend supports everything"):
        auto.choose(problem(SPARSE))


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    api._said.cache_clear()
    x = torch.randn(1, 2, 64, 16)
    with caplog.at_level(logging.INFO, "mobazoo.attention"):
        for _ in range(3):
            attend(x, x, x, pattern=MoBA(16, 3))
        attend(x, x, x)
    assert caplog.messages == [
        "backend auto: flash for MoBA(block_size=16, top_k=3) on cpu torch.float32: "
        "reads chosen blocks only, no mask in memory",
        "backend auto: sdpa for Full() on cpu torch.float32: dense, no mask needed",
    ]


def test_moba_that_reads_everything_is_chosen_for_as_full(caplog: pytest.LogCaptureFixture) -> None:
    api._said.cache_clear()
    x = torch.randn(1, 2, 64, 16)
    with caplog.at_level(logging.INFO, "mobazoo.attention"):
        out = attend(x, x, x, pattern=MoBA(16, 4))
    assert caplog.messages[0].startswith("backend auto: sdpa for Full()")
    assert torch.equal(out, attend(x, x, x))


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash"])
def test_a_named_backend_is_the_one_that_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {name: spy(monkeypatch, module, "run", lambda *_: None) for name, module in BACKENDS.items()}
    x = torch.randn(1, 2, 64, 16)
    attend(x, x, x, backend=backend)
    assert {name: len(notes) for name, notes in calls.items() if notes} == {backend: 1}
