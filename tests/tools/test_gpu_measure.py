"""How the GPU report measures: who fails is a line, rivals compute full attention, peers get what they take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mobazoo.attention import attend
from mobazoo.attention.kernels import flex
from tools.gpu import flex as gpu_flex
from tools.gpu import measure as gpu_measure
from tools.gpu.measure import Candidate, measure, right
from tools.gpu.page import targets
from tools.gpu.rivals import ATEN, _wheel, peers
from tools.gpu.shapes import SHAPES, inputs


def failing(after: int) -> Callable[[], None]:
    """A call that runs out of memory from call ``after`` on."""
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        if len(calls) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    return work


def lost() -> dict[str, float]:
    raise ValueError


def test_who_fails_is_a_line() -> None:
    def fine() -> None:
        torch.zeros(1 << 22).sum()

    candidates = {
        "at once": Candidate("full", failing(0)),
        "later": Candidate("blocks", failing(1)),
        "in its check": Candidate("blocks", fine, lost),
        "wrong": Candidate("blocks", fine, lambda: {"out": 1.5}),
        "not a number": Candidate("blocks", fine, lambda: {"out": float("nan")}),
        "fine": Candidate("blocks", fine, lambda: {"out": 0.5}),
    }
    *_, rows = measure(candidates, "cpu", 60.0)
    for name in ("at once", "later"):
        assert rows[name]["cannot"] == "OutOfMemoryError: CUDA out of memory. Tried"
    assert rows["in its check"]["cannot"] == "ValueError: "
    assert rows["fine"]["errors"] == {"out": 0.5}
    assert rows["fine"]["seconds"]
    for wrong in ("wrong", "not a number"):
        assert not right(
            {name: row for name, row in rows.items() if name != ({"wrong", "not a number"} - {wrong}).pop()}
        )
    some = {name: rows[name] for name in ("later", "fine")}
    assert right(some, "fine")
    assert not right(some, "later")


def test_a_short_call_is_repeated_if_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of one call counts only where slow rivals leave no time for another."""
    monkeypatch.setattr(gpu_measure, "_LONG_ENOUGH", {"cpu": 1.0})
    monkeypatch.setattr(gpu_measure, "_ROUNDS", {"cpu": 3})
    calls: list[int] = []

    def sample(work: Callable[[], Any], _: str, repeats: int = 1) -> tuple[float, int]:
        calls.append(repeats)
        work()
        return 0.25 if repeats == 1 else 0.125, 0

    monkeypatch.setattr(gpu_measure, "once", sample)
    for seconds, taken, repeated in ((0.0, [0.25], [1, 1]), (60.0, [0.125, 0.125], [1, 1, 4, 4])):
        calls.clear()
        *_, rows = measure({"short": Candidate("blocks", lambda: None)}, "cpu", seconds)
        assert rows["short"]["seconds"] == taken
        assert calls == repeated
        assert right(rows, "short")


def test_targets_met_and_missed() -> None:
    def section(ours: float, theirs: float, memory: int) -> dict[str, Any]:
        rows = {"triton": (ours, memory, "blocks"), ATEN: (theirs, 100, "full"), "SDPA cuDNN": (theirs / 2, 1, "full")}
        return {
            "rows": {name: {"seconds": [s], "bytes": b, "kind": kind} for name, (s, b, kind) in rows.items()},
            "floor": {"all": {"seconds": ours / 4}},
        }

    def case(windows: float, ours: float) -> dict[str, Any]:
        rows = {"auto": {"seconds": [ours], "kind": "blocks"}, "SDPA cuDNN": {"seconds": [1.0], "kind": "full"}}
        return {"windows": windows, "rows": rows}

    cases = [case(0.5, 1.04), case(1.0, 1.06), case(2.0, 9.0), case(5.0, 0.9), case(9.0, 0.8)]
    found = targets({"64k": section(0.03, 0.33, 115), "1m": section(1.0, 8.0, 120), "auto": {"cases": cases}})[2:]
    assert found[0] == "| 64k: times FlashAttention-2 | at least 10 | 11.00 | met | 7.5 | 30.0 | 25% |"
    assert "| 512k: times FlashAttention-2 | at least 30 |  | not measured |" in found[1]
    assert "| 8.00 | missed |" in found[2]
    assert "| at most 1.15 | 1.15 | met |" in found[3]
    assert "| at most 1.15 | 1.20 | missed |" in found[5]
    assert "| at most 1 | 0.90 | met |" in found[6]
    assert "| at most 1.05 | 1.06 | missed |" in found[7]


def module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Any) -> None:
    made = ModuleType(name)
    for key, value in functions.items():
        setattr(made, key, value)
    for part in (name.partition(".")[0], name):
        monkeypatch.setitem(sys.modules, part, made if part == name else ModuleType(part))


def test_peers_get_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows end to end, ends of rows as int32, and a result that comes back into our layout."""
    shape = replace(SHAPES["1m"].small(), batch=2, dtype=torch.float32)
    tensors = inputs(shape, "cpu")[:3]
    want = attend(*tensors, pattern=shape.pattern, backend="reference")

    def compute(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, slots: int, size: int, top_k: int) -> Tensor:
        assert ends.dtype == torch.int32
        assert ends.tolist() == [0, shape.length, 2 * shape.length]
        assert (slots, size, top_k) == (shape.length, shape.block_size, shape.top_k)
        rows = (x.unflatten(0, (2, -1)).transpose(1, 2) for x in (q, k, v))
        return attend(*rows, pattern=shape.pattern, backend="reference").transpose(1, 2).flatten(0, 1)

    def flash_moba(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, also: Tensor, *rest: Any, causal: bool) -> Tensor:
        assert causal
        assert torch.equal(ends, also)
        assert rest[0] == rest[1]
        assert k.shape[1] == shape.key_heads
        return compute(q, k, v, ends, *rest[1:])

    def moba(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, slots: int, size: int, top_k: int) -> Tensor:
        assert k.shape == v.shape == q.shape
        return compute(q, k, v, ends, slots, size, top_k)

    module(monkeypatch, "flash_moba", flash_moba_varlen_func=flash_moba)
    module(monkeypatch, "moba.moba_efficient", moba_attn_varlen=moba)
    for name, run in peers(shape).items():
        torch.testing.assert_close(run(*tensors), want, msg=name)


def test_the_wheel_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        rows = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*rows, is_causal=causal, enable_gqa=True).transpose(1, 2)

    q, k, v = (torch.randn(2, heads, 20, 16) for heads in (4, 2, 2))
    with pytest.raises(RuntimeError, match="not installed here"):
        _wheel(q, k, v)
    module(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    torch.testing.assert_close(_wheel(q, k, v), attend(q, k, v, backend="reference"))


def test_options_of_flex_reach_it_and_a_row_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_flex, "capability", lambda _: "9.0")
    monkeypatch.setattr(flex, "_capability", lambda _: "9.0")

    class Query:
        device, shape = torch.device("cuda"), (1, 2, 128, gpu_flex.SHAPE.dim)

        @staticmethod
        def element_size() -> int:
            return 2

    names = list(gpu_flex.OPTIONS)
    for called in names:
        seen = gpu_flex.under(gpu_flex.SHAPE, "cuda", gpu_flex.OPTIONS[called], lambda: flex._options(Query))()
        assert (seen or {}) == gpu_flex.OPTIONS[called]
        for key, value in (seen or {}).items():
            assert "BLOCK" not in key or 128 % value == 0
    Query.shape = (1, 2, 127, gpu_flex.SHAPE.dim)  # another kernel, with tiles of its own
    assert gpu_flex.under(gpu_flex.SHAPE, "cuda", gpu_flex.OPTIONS[names[1]], lambda: flex._options(Query))() is None
    rows = {
        f"{backend}, {called}": {"seconds": [] if called == names[3] else [1.0 - 0.2 * n]}
        for backend in ("flex", "flex_routed")
        for n, called in enumerate(names)
    }
    said = gpu_flex.tuned(gpu_flex.SHAPE, "cuda", rows)
    assert said[3].startswith('    ("9.0", 128, 2): {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4,')
    rows[f"flex, {names[2]}"]["seconds"] = [3.0]
    rows[f"flex, {names[1]}"]["seconds"] = [3.0]
    assert gpu_flex.tuned(gpu_flex.SHAPE, "cuda", rows) == ["FlexAttention's own options stay."]
