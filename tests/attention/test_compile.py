"""``attend`` inside ``torch.compile(fullgraph=True)``: same numbers, one graph, few recompilations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mobazoo.attention import Segments, attend
from mobazoo.errors import InputError
from tests.factories import Case, Inputs, chosen_by, gate_routes, inputs, oracle, run, segments_of
from tests.marks import COMPILING, INTERPRETED, able
from tests.tolerance import Result, check

# ``aot_eager`` traces forward and backward through the operators' fakes and autograd formulas, and compiles no code.
TRACER = "aot_eager"
PATTERNS = {"moba": Case(((90,), (90,)), 7, 3, 4, 2, 16), "full": Case(((90,), (90,)), 0, 1, 4, 2, 16)}
PACKED = ((-4, 50, 36), (90,))
BACKENDS = sorted({name for case in PATTERNS.values() for name in able(case, grad=True)} - {*COMPILING, *INTERPRETED})
LENGTHS = (64, 72, 81, 90, 97, 130)
MOST_GRAPHS = 3


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_packing(case: Case, packed: bool) -> Case:
    return replace(case, rows=PACKED) if packed else case


def differentiated(call: Callable[..., Tensor], data: Inputs, *args: Any) -> Result:
    leaves = [x.detach().requires_grad_() for x in data.qkv]
    out = call(*leaves, *args)
    return Result(out.detach(), torch.autograd.grad(out, leaves, data.dout))


@pytest.mark.parametrize("packed", [False, True], ids=["no segments", "segments"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_one_graph_with_the_right_numbers(backend: str, pattern: str, packed: bool) -> None:
    case = with_packing(PATTERNS[pattern], packed)
    if backend != "auto" and backend not in able(case, grad=True):
        pytest.skip(f"{backend} does not compute {case.pattern}")
    data = inputs(case)
    counter = CompileCounterWithBackend(TRACER)

    @torch.compile(backend=counter, fullgraph=True)
    def compiled(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
        return attend(q, k, v, pattern=case.pattern, backend=backend, segments=segments) * 1.0

    result = differentiated(compiled, data, segments_of(case.rows) if packed else None)
    expected = oracle(case, data, chosen_by(gate_routes(case, data.q, data.k)) if case.block_size else [])
    check(result, expected, run(case, data, "reference", grad=True), backend)
    assert counter.frame_count == 1


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_do_not_recompile_without_end(backend: str, pattern: str) -> None:
    case = PATTERNS[pattern]
    if backend not in able(case, grad=True):
        pytest.skip(f"{backend} does not compute {case.pattern}")
    counter = CompileCounterWithBackend(TRACER)
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, pattern=case.pattern, backend=backend), backend=counter, fullgraph=True
    )
    for length in LENGTHS:
        shorter = Case(((length,), (length,)), case.block_size, case.top_k, 4, 2, 16)
        data = inputs(shorter)
        got = differentiated(compiled, data).out
        assert torch.allclose(got, run(shorter, data, "reference").out, atol=1e-4)
    assert counter.frame_count <= MOST_GRAPHS, f"{counter.frame_count} graphs for {len(LENGTHS)} lengths"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [0, 64, 512])
def test_auto_is_one_graph_at_every_length(block_size: int, dtype: torch.dtype) -> None:
    """It chooses by length, and what it asks of the machine is no part of a graph: few of them for many lengths."""
    case = Case(((600,),), block_size, 3 if block_size else 1, 4, 2, 16)
    counter = CompileCounterWithBackend(TRACER)
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, pattern=case.pattern), backend=counter, fullgraph=True)
    for length in (490, 500, 511, 512, 530, 600, 640):
        data = inputs(replace(case, rows=((length,),)), dtype)
        got = differentiated(compiled, data)
        want = differentiated(lambda *qkv: attend(*qkv, pattern=case.pattern), data)
        assert all(torch.equal(x, y) for x, y in zip(got.tensors, want.tensors, strict=True))
    assert counter.frame_count <= MOST_GRAPHS + 1


def test_a_start_beyond_the_row_is_refused_inside_a_graph() -> None:
    case = PATTERNS["moba"]
    data = inputs(case)
    compiled = torch.compile(
        lambda q, k, v, start: attend(q, k, v, pattern=case.pattern, backend="flash", q_start=start),
        backend=TRACER,
        fullgraph=True,
    )
    for start in (87, 5000, -1):
        with pytest.raises(InputError, match=rf"q_start must be in 0 .. S - T = 86, got {start}"):
            compiled(data.q[:, :, :4], data.k, data.v, torch.tensor(start))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_batches_do_not_recompile_without_end(backend: str, pattern: str) -> None:
    """Batches differ in length and in their host ints."""
    case = PATTERNS[pattern]
    if backend not in able(case, grad=True):
        pytest.skip(f"{backend} does not compute {case.pattern}")
    counter = CompileCounterWithBackend(TRACER)
    compiled = torch.compile(
        lambda q, k, v, segments: attend(q, k, v, pattern=case.pattern, backend=backend, segments=segments),
        backend=counter,
        fullgraph=True,
    )
    for length in LENGTHS:
        packed = Case(
            ((length - 30, 30), (-5, length // 2, length - length // 2 - 5)), case.block_size, case.top_k, 4, 2, 16
        )
        data = inputs(packed)
        got = compiled(*data.qkv, segments_of(packed.rows))
        assert torch.allclose(got, run(packed, data, "reference").out, atol=1e-4)
    assert counter.frame_count <= MOST_GRAPHS, f"{counter.frame_count} graphs for {len(LENGTHS)} lengths"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_with_a_start_in_a_tensor_is_one_graph(backend: str, pattern: str) -> None:
    """As a compiled ``generate`` with a static cache decodes: shapes stay, the start moves."""
    case = PATTERNS[pattern]
    if backend not in able(case, grad=False):
        pytest.skip(f"{backend} does not compute {case.pattern}")
    data = inputs(case)
    counter = CompileCounterWithBackend(TRACER)
    compiled = torch.compile(
        lambda q, k, v, start: attend(q, k, v, pattern=case.pattern, backend=backend, q_start=start),
        backend=counter,
        fullgraph=True,
    )
    whole = run(case, data, "reference").out
    for slot in (40, 41, 42, 89):
        with torch.no_grad():
            got = compiled(data.q[:, :, slot : slot + 1], data.k, data.v, torch.tensor(slot))
        assert torch.allclose(got, whole[:, :, slot : slot + 1], atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("source", ["mask", "position_ids", "position_ids with ints", "cu_seqlens with ints"])
def test_segments_are_built_inside_the_graph(source: str) -> None:
    """A compiled forward may build its ``Segments``; without host ints from the collator the bounds are ``(S, S)``."""
    rows = ((-4, 86), (90,)) if source == "mask" else ((50, 40),) if "cu" in source else PACKED
    case = Case(rows, 7, 3, 4, 2, 16)
    data, want = inputs(case), segments_of(rows)
    mask = (want.doc >= 0).long()

    @torch.compile(backend=TRACER, fullgraph=True)
    def compiled(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        if source == "mask":
            segments = Segments.from_attention_mask(mask)
        elif source == "position_ids":
            segments = Segments.from_position_ids(ids, mask)
        elif source == "position_ids with ints":
            segments = Segments.from_position_ids(ids, mask, max_docs=2, max_len=90)
        else:
            segments = Segments.from_cu_seqlens(ends, 90, max_len=50)
        return attend(q, k, v, pattern=case.pattern, backend="flash", segments=segments)

    got = compiled(*data.qkv, mask, want.pos.long(), torch.tensor([0, 50, 90]))
    assert torch.allclose(got, run(case, data, "reference").out, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inductor(backend: str, pattern: str) -> None:
    """The same through generated code, which needs a C++ compiler."""
    case = with_packing(PATTERNS[pattern], True)
    if backend not in able(case, grad=True):
        pytest.skip(f"{backend} does not compute {case.pattern}")
    data = inputs(case)
    segments = segments_of(case.rows)
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, pattern=case.pattern, backend=backend, segments=segments), fullgraph=True
    )
    expected = oracle(case, data, chosen_by(gate_routes(case, data.q, data.k)) if case.block_size else [])
    check(differentiated(compiled, data), expected, run(case, data, "reference", grad=True), backend)
