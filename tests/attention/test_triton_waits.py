"""The Triton backend's launches: nothing reads a number back from the device, and first uses are said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mobazoo.attention import MoBA, Routes
from mobazoo.attention.backends import triton
from mobazoo.attention.blocks import centroids_by
from mobazoo.attention.kernels import triton_launch, triton_route
from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.routing import route_by
from tests.factories import Case, Inputs, inputs, segments_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton.py asks the GPU itself")

aten = torch.ops.aten
# What gives the host a number, or a tensor whose shape follows from one: each would wait for a GPU.
WAITING = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten.unique_dim,
    aten._unique2,
}


class NeverWaits(TorchDispatchMode):
    """Refuses operators of ``WAITING``, indexing by a mask, and repeating by counts that a tensor holds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        by_count = func in (aten.repeat_interleave.Tensor, aten.repeat_interleave.self_Tensor)
        if func.overloadpacket in WAITING or by_mask or by_count:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(torch.ones_like(x)),
    ],
)
def test_the_watch_sees(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="waits for the device"), NeverWaits():
        call(torch.ones(3, dtype=torch.int64))


CASES = {
    "packed": Case(((1, 30, -2, 7), (-40,)), 8, 3, 4, 2, 16),
    "full": Case(((1, 30, -2, 7), (-40,)), 0, 1, 4, 2, 16),
    "chunk": Case(((40,),), 8, 3, 4, 2, 16, queries=9, first=20),
}


def gate(case: Case, data: Inputs, start: Tensor) -> Routes | None:
    if not isinstance(case.pattern, MoBA):
        return None
    segments = segments_of(case.rows)
    known = centroids_by("triton", data.k, case.block_size, segments)
    return route_by("triton", data.q, known, case.pattern, segments, start)


@pytest.mark.parametrize(("name", "few"), [("packed", True), ("full", False), ("chunk", False)])
def test_nothing_waits(name: str, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedules themselves: inside an opaque operator the watch would not see."""
    # A start on a CPU, which stands for a device here, would be looked at; one on a device is not.
    monkeypatch.setattr("mobazoo.attention.routing.first_slot", lambda what, queries, slots, q_start: q_start)
    if few:
        monkeypatch.setattr("mobazoo.attention.kernels.triton_slabs.SLAB_BYTES", 4096)
    case = CASES[name]
    data, segments, start = inputs(case), segments_of(case.rows), torch.tensor(case.q_start)
    ways: list[str] = []
    for module in (triton_launch, triton_route):
        begin = module.begin
        monkeypatch.setattr(module, "begin", lambda way, *rest, begin=begin: ways.append(way) or begin(way, *rest))
    routes = gate(case, data, start)
    bounds = (segments.max_docs, segments.max_len, segments.whole)
    table = (routes.index, routes.start) if routes else (None, None)
    layout = Layout(segments.doc, segments.pos, *table, start, case.block_size, *bounds)
    for name in ("tolist", "numpy", "cpu"):  # which no operator stands behind on a CPU
        monkeypatch.setattr(Tensor, name, None)
    with NeverWaits():
        if routes:
            mean = triton_route.means(data.k, routes.start, case.block_size)
            stop = torch.zeros(len(case.rows), case.length, dtype=torch.int64) + mean.shape[2]
            triton_route.choose(data.q, mean, torch.zeros_like(stop), stop, torch.empty_like(routes.index))
            gate(case, data, start)  # what surrounds the operators
        out, lse = triton._forward(*data.qkv, layout, 0.25, "")
        triton._backward(data.dout, *data.qkv, out, lse, layout, 0.25, "")
    gates = {"centroids", "gate"} if routes else set()
    assert set(ways) == {"forward", "backward"} | gates  # each says before its first launch that it compiles
