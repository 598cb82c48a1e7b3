"""``flex`` and ``flash`` on a GPU: right or not, with which options and kernels, for queries that differ or agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mobazoo.attention import Segments
from mobazoo.attention.blockmask import block_mask
from mobazoo.attention.kernels import flex
from mobazoo.attention.kernels.providers import NAMES
from mobazoo.attention.kernels.triton_tiles import capability
from tools.gpu.measure import Candidate, Rows, measure, right
from tools.gpu.rivals import by_blocks, flash_by, full, without_routes
from tools.gpu.shapes import SHAPES, Shape, gate, inputs, step
from tools.gpu.verify import Routed, verify

SHAPE = replace(SHAPES["64k"], length=1 << 14)
_SECONDS = 150.0
_WORTH = 0.97  # of the default's time: what is no better than that is noise
_ALIKE = 128  # queries in a row that are the same, so that whole tiles are read
DEFAULT = "default"


def options(rows: int, keys: int, warps: int, stages: int) -> dict[str, int]:
    """Of forward and backward: tiles of queries and keys, and the other way round where keys are held."""
    forward = {"fwd_BLOCK_M": rows, "fwd_BLOCK_N": keys, "fwd_num_warps": warps, "fwd_num_stages": stages}
    backward = {"bwd_BLOCK_M1": keys, "bwd_BLOCK_N1": rows, "bwd_BLOCK_M2": rows, "bwd_BLOCK_N2": keys}
    return {**forward, **backward, "bwd_num_warps": warps, "bwd_num_stages": stages}


# Each is compiled for each backend, which takes much of a minute. Tiles divide 128, as the lists of tiles do.
OPTIONS: dict[str, dict[str, int]] = {
    DEFAULT: {},
    "128 x 64, 8 warps, 2 stages": options(128, 64, 8, 2),
    "64 x 64, 4 warps, 3 stages": options(64, 64, 4, 3),
    "128 x 32, 8 warps, 3 stages": options(128, 32, 8, 3),
}


def section(device: str) -> Iterator[dict[str, Any]]:
    """The report's section, more complete each time."""
    shape = SHAPE.small() if device == "cpu" else SHAPE
    tensors = inputs(shape, device)
    alike = inputs(shape, device, alike=8 if device == "cpu" else _ALIKE)
    candidates = {name: Candidate("full", step(run, tensors, backward=True)) for name, run in full(device).items()}

    def add(name: str, run: Routed, given: list[Tensor], chosen: dict[str, int]) -> None:
        work = under(shape, device, chosen, step(without_routes(run), given, backward=True))
        check = under(shape, device, chosen, partial(verify, shape, given, run))
        candidates[name] = Candidate("blocks", work, check)

    for name, run in by_blocks(shape, "flex", "flex_routed").items():
        for called, chosen in OPTIONS.items():
            add(f"{name}, {called}", run, tensors, chosen)
        add(f"{name}, queries agree", run, alike, {})
    for provider in NAMES:
        add(f"flash, {provider}", flash_by(shape, provider), tensors, {})
    said = f"{shape.spoken()}. {tiles(shape, tensors, 'random')}; {tiles(shape, alike, 'agreeing')}."
    for rows in measure(candidates, device, _SECONDS):
        needed = () if device == "cpu" else ("flex, default", "flex_routed, default", "flash, aten")
        yield {"right": right(rows, *needed), "said": said, "rows": rows, "lines": tuned(shape, device, rows)}


def under(shape: Shape, device: str, chosen: dict[str, int], work: Callable[[], Any]) -> Callable[[], Any]:
    """The same call with options of FlexAttention's kernels."""
    key = (capability(torch.device(device)), shape.dim, shape.dtype.itemsize)

    def called() -> Any:
        with patch.dict(flex.TUNED, {key: chosen}) if chosen else nullcontext():
            return work()

    return called


def tiles(shape: Shape, tensors: list[Tensor], kind: str) -> str:
    """How many tiles flex reads of those that full attention would, and how many are marked as full."""
    q, k = tensors[:2]
    routes, segments = gate(q, k, shape.pattern), Segments.single(shape.batch, shape.length, q.device)
    ours, all_of_it = (block_mask(some, segments, shape.length, 0, backward=False) for some in (routes, None))
    some, whole = (int(n.sum()) if n is not None else 0 for n in (ours.kv_num_blocks, ours.full_kv_num_blocks))
    dense = sum(int(n.sum()) for n in (all_of_it.kv_num_blocks, all_of_it.full_kv_num_blocks) if n is not None)
    dense *= ours.kv_num_blocks[..., 0].numel() // all_of_it.kv_num_blocks[..., 0].numel()
    read = some + whole
    return f"{kind} queries: flex reads {read / dense:.0%} of the causal tiles, {whole / read:.0%} of them marked full"


def tuned(shape: Shape, device: str, rows: Rows) -> list[str]:
    """A row for ``kernels.flex.TUNED`` where options are better than the default for both backends together."""
    time = {
        called: sum(median(seconds) for seconds in some)
        for called in OPTIONS
        if all(some := [rows[f"{name}, {called}"]["seconds"] for name in ("flex", "flex_routed")])
    }
    best = min(time, key=lambda called: time[called], default=DEFAULT)
    if DEFAULT not in time or time[best] >= _WORTH * time[DEFAULT]:
        return ["FlexAttention's own options stay."]
    key = (capability(torch.device(device)), shape.dim, shape.dtype.itemsize)
    return ["A row for `kernels/flex.TUNED`:", "", "```python", f"    {key}: {OPTIONS[best]},".replace("'", '"'), "```"]
