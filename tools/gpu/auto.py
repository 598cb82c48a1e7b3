"""What ``auto`` takes against full attention, at lengths where blocks leave nothing out and beyond."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from mobazoo.attention import Full
from mobazoo.attention.auto import choose
from mobazoo.attention.problem import Problem
from tools.gpu.measure import Candidate, attempt, measure, right
from tools.gpu.rivals import TRITON, by_blocks, full, without_routes
from tools.gpu.shapes import SHAPES, Shape, inputs, step
from tools.gpu.verify import verify

AUTO = "auto"
_SECONDS = 400.0
_FAR = 4  # windows beyond which blocks must not lose


def cases() -> list[Shape]:
    """Both papers' patterns, in windows of ``top_k * block_size`` tokens: within, just beyond, far beyond."""
    found = []
    for name in ("64k", "1m"):
        shape = SHAPES[name]
        lengths = [shape.window // 2, shape.window, 2 * shape.window]
        lengths += [_FAR * shape.window + shape.block_size, 8 * shape.window]
        found += [replace(shape, length=n, backward=way) for n in lengths for way in (False, True)]
    return found


def section(device: str) -> Iterator[dict[str, Any]]:
    """The report's section, more complete each time."""
    dry = device == "cpu"
    shapes = [shape.small(_FAR + 1) for shape in cases()[:7:3]] if dry else cases()
    done: list[dict[str, Any]] = []
    for shape in shapes:
        case: dict[str, Any] = {"shape": shape.spoken(), "windows": shape.length / shape.window}
        case["took"] = taken(shape, device)
        tensors = attempt(case, partial(inputs, shape, device))
        if tensors is None:
            done.append(case)
            continue
        rivals = {
            name: Candidate("full", step(run, tensors, backward=shape.backward)) for name, run in full(device).items()
        }
        ours = {
            name: Candidate(
                "blocks",
                step(without_routes(run), tensors, backward=shape.backward),
                partial(verify, shape, tensors, run) if shape.length > shape.window else None,
            )
            for name, run in by_blocks(shape, AUTO, TRITON).items()
        }
        for rows in measure({**rivals, **ours}, device, _SECONDS / len(shapes)):
            case["rows"] = rows
        done.append(case)
        yield found(done)
    yield found(done)


def found(done: list[dict[str, Any]]) -> dict[str, Any]:
    """The section so far."""
    said = "Full attention against what `auto` takes; a window is `top_k * block_size` tokens, up to which it is exact."
    return {"right": all("rows" in case and right(case["rows"], AUTO) for case in done), "said": said, "cases": done}


def taken(shape: Shape, device: str) -> str:
    """The backend that ``auto`` takes."""
    pattern = shape.pattern if shape.length > shape.window else Full()
    name, _ = choose(Problem(pattern, device, shape.dtype, shape.dim, shape.backward, shape.length, shape.length))
    return name
