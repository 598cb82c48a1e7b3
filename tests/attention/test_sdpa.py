"""The sdpa backend's chunks of queries, which small cases never reach by themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mobazoo.attention import Full, attend
from mobazoo.attention.backends import sdpa
from tests.attention.parity.cases import FULL
from tests.factories import inputs, oracle, run, segments_of, spy
from tests.tolerance import check


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the chunks that ran, under a budget that makes many."""
    monkeypatch.setattr(sdpa, "_MASK_ENTRIES", 1000)
    return spy(monkeypatch, sdpa, "_masked", lambda arguments, _: arguments[0].shape[2])


@pytest.mark.parametrize("start", ["int", "tensor"])
@pytest.mark.parametrize("name", [name for name, case in FULL.items() if name not in ("whole", "decode")])
def test_chunks_equal_the_oracle(name: str, start: str, chunks: list[int]) -> None:
    case = FULL[name]
    data = inputs(case)
    q_start = case.q_start if start == "int" else torch.tensor(case.q_start)
    result = run(case, data, "sdpa", grad=True, q_start=q_start)
    assert len(chunks) > 2
    assert sum(chunks) == case.length
    check(result, oracle(case, data), run(case, data, "reference", grad=True))


def test_chunks_of_a_compiled_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths with the same number of chunks share a graph."""
    torch._dynamo.reset()
    monkeypatch.setattr(sdpa, "_MASK_ENTRIES", 4000)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda q, k, v, segments: attend(q, k, v, pattern=Full(), backend="sdpa", segments=segments),
        backend=counter,
        fullgraph=True,
    )
    for length in (80, 83, 85, 88):
        case = replace(FULL["chunk"], rows=((length - 3, 3),), queries=None)
        data = inputs(case)
        got = compiled(*data.qkv, segments_of(case.rows))
        assert torch.allclose(got, run(case, data, "reference").out, atol=1e-5)
    assert counter.frame_count <= 3
    torch._dynamo.reset()
