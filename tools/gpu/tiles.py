"""Tries tile sizes of the Triton kernels on the machine at hand, and prints rows for ``triton_tiles.MEASURED``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mobazoo.attention import attend
from mobazoo.attention.kernels.triton_tiles import DEFAULT, MEASURED, SHARED, Tiles, capability, entry, shared_bytes
from tools.gpu.measure import attempt, once
from tools.gpu.shapes import Shape, gate, inputs

Work = Callable[[], list[Tensor]]

KERNELS = tuple(DEFAULT)
_DIMS = (64, 128, 256)
_ROUNDS = 3
_WORTH = 0.97  # of the default's time: what is no better than that is noise


def tune(device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """Times candidates of each kernel by head dim, about ``seconds`` in all, in bfloat16; the report's section."""
    dry = device == "cpu"
    shape = Shape(1, 16, 4, 1 << 15, 128, 8, backward=True)
    shapes = [replace(shape.small(), length=64)] if dry else [replace(shape, dim=dim) for dim in _DIMS]
    share = seconds / (len(shapes) * len(KERNELS))
    lines = ["| kernels | head dim | tried | default ms | best ms | best |", "| --- " * 6 + "|"]
    rows: list[str] = []
    mistakes: list[str] = []
    for one, kernels in product(shapes, KERNELS):
        key = (capability(torch.device(device)), kernels, one.dim, one.dtype.itemsize)
        failed: dict[str, str] = {}
        tried = attempt(failed, partial(trials, one, device, key, share, dry=dry))
        if tried is None:  # the default itself
            mistakes.append(f"Failed: {kernels}, head dim {one.dim}: {failed['cannot']}.")
        else:
            times, wrong = tried
            usual, best = next(iter(times)), min(times, key=lambda held: times[held])
            ms = f"{1e3 * times[usual]:.2f} | {1e3 * times[best]:.2f}"
            lines.append(f"| {kernels} | {one.dim} | {len(times)} | {ms} | {best} |")
            mistakes += [f"Wrong results: {kernels}, head dim {one.dim}, {held}." for held in wrong]
            if times[best] < _WORTH * times[usual]:
                row = f"    {key}: Tiles({best.rows}, {best.stream}, {best.warps}, {best.stages}),"
                rows.append(row.replace("'", '"'))
        found = ["Rows for `triton_tiles.MEASURED`:", "", "```python", *rows, "```"] if rows else ["The default stays."]
        said = "Tile sizes that were tried, the default first."
        yield {"right": not mistakes, "said": said, "lines": [*lines, "", *mistakes, "", *found]}


def works(shape: Shape, device: str) -> dict[str, Work]:
    """What is timed for each kind of kernels."""
    q, k, v, dout = inputs(shape, device)
    routes = gate(q, k, shape.pattern)

    def forward() -> Tensor:
        return attend(q, k, v, pattern=shape.pattern, backend="triton", routes=routes)

    out = forward()
    grads: Work = lambda: list(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))  # noqa: E731
    choice: Work = lambda: [gate(q, k, shape.pattern, "triton").index]  # noqa: E731
    return {"forward": lambda: [forward().detach()], "backward": grads, "keys": grads, "gate": choice}


def candidates(key: tuple[str, str, int, int]) -> Iterator[Tiles]:
    """The row in use, then others whose tiles fit shared memory."""
    name, kernels, width, itemsize = key
    usual = entry(kernels, width, itemsize, name)
    yield usual
    room = SHARED.get(name, min(SHARED.values()))
    for rows, stream, warps, stages in product((64, 128, 32), (64, 32, 128), (4, 8), (2, 3, 1)):
        held = Tiles(rows, stream, warps, stages)
        if held != usual and shared_bytes(kernels, width, itemsize, held) <= room:
            yield held


def trials(
    shape: Shape, device: str, key: tuple[str, str, int, int], seconds: float, *, dry: bool
) -> tuple[dict[Tiles, float], list[Tiles]]:
    """Seconds by candidate, the first one's first, and those whose results are not the first one's."""
    work = works(shape, device)[key[1]]
    times: dict[Tiles, float] = {}
    wrong: list[Tiles] = []
    want: list[Tensor] = []
    refused = (RuntimeError, import_module("triton.runtime.errors").TritonError)
    begin = time.perf_counter()
    for number, held in enumerate(candidates(key)):
        if number and (time.perf_counter() - begin > seconds or (dry and number == 2)):
            break
        with patch.dict(MEASURED, {key: held}):
            try:
                got = work()  # compiles
                spent = [once(work, device)[0] for _ in range(1 if dry else _ROUNDS)]
            except refused:  # too many registers or bytes for this machine: no candidate
                if not times:
                    raise
                continue
        want = want or got
        if all(_agree(a, b) for a, b in zip(got, want, strict=True)):
            times[held] = median(spent)
        else:
            wrong.append(held)
    return times, wrong


def _agree(got: Tensor, want: Tensor) -> bool:
    if not want.is_floating_point():  # choices: near-ties may fall differently
        return float((got != want).float().mean()) <= 1e-3
    return float((got - want).norm()) <= 8 * torch.finfo(want.dtype).eps * float(want.norm())
