"""Measures a GPU: tests, the papers' shapes against full attention, and whether the results are right.

Run it by ``tools/gpu_report.sh``. Each section is kept in the JSON file as soon as it is done, and the page is written
from that file, so that sections may run one by one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mobazoo.attention.gates import TORCH, TRITON
from mobazoo.files import write_whole
from mobazoo.results import command, machine
from tools.gpu_shapes import SHAPES, Run, Shape, by_blocks, full, gate, inputs, verify, verify_gate
from tools.gpu_tiles import tune

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("tests", *SHAPES, "tiles")
_SECONDS = 240.0  # of measuring a section, after the first call of each candidate
_TUNING = 420.0  # of trying tile sizes, compiling included
_ROUNDS = {"cuda": 7, "cpu": 2}


def main() -> int:
    """Runs the sections that are asked for; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", action="append", choices=SECTIONS, help="may be repeated; default: all")
    parser.add_argument("--dest", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the report")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; writes nothing without --dest")
    said = parser.parse_args()
    if not said.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run tries the script on a CPU")
    device = "cpu" if said.dry_run else "cuda"
    name = "dry-run" if said.dry_run else slug(torch.cuda.get_device_name())
    kept = said.dest / f"{name}.json"
    write = not said.dry_run or said.dest != parser.get_default("dest")
    report: dict[str, Any] = json.loads(kept.read_text("utf-8")) if write and kept.exists() else {"sections": {}}
    for section in said.section or SECTIONS:
        found = run(section, device)
        report["sections"][section] = {"command": command(), "machine": about(device), **found}
        if write:
            write_whole(kept, json.dumps(report, indent=1) + "\n")
            write_whole(kept.with_suffix(".md"), page(report))
    if not write:
        print(page(report))
    return int(any(not section["right"] for section in report["sections"].values()))


def run(section: str, device: str) -> dict[str, Any]:
    """One section; ``right`` says whether all is well."""
    if section == "tests":
        return tests(dry=device == "cpu")
    return tune(device, _TUNING) if section == "tiles" else measure(SHAPES[section], device)


def slug(name: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def about(device: str) -> dict[str, str]:
    """What the figures depend on."""
    if device == "cpu":
        return {**machine(), "gpu": "none: a dry run"}
    memory = torch.cuda.get_device_properties(0).total_memory >> 30
    return {**machine(), "gpu": f"{torch.cuda.get_device_name()}, {memory} GiB", "cuda": str(torch.version.cuda)}


def tests(*, dry: bool) -> dict[str, Any]:
    """The tests that `make test-gpu` runs; a dry run only collects them."""
    arguments = ["-m", "pytest", "-o", "addopts=", "-m", "gpu", *(["--collect-only", "-q"] if dry else [])]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    last = (done.stdout.strip() or done.stderr.strip() or "nothing said").splitlines()
    failed = [f"- {line}" for line in last if line.startswith(("FAILED", "ERROR"))]
    return {"right": done.returncode == 0, "said": last[-1].strip("= "), "lines": failed}


def measure(shape: Shape, device: str) -> dict[str, Any]:
    """Times, memory and correctness of one shape."""
    if device == "cpu":
        shape = shape.small()
    tensors = inputs(shape, device)
    rows: dict[str, dict[str, Any]] = {}
    able: dict[str, Callable[[], None]] = {}
    works = {"full": full(device), "blocks": by_blocks(shape)}
    calls = {
        (kind, name): step(call, tensors, backward=shape.backward)
        for kind, some in works.items()
        for name, call in some.items()
    }
    for by in (TORCH, TRITON):
        calls["gate", f"the gate by {by}"] = partial(choose, shape, tensors, by)
    for (kind, name), work in calls.items():
        rows[name] = {"kind": kind, "seconds": []}
        try:
            rows[name]["first_seconds"], rows[name]["bytes"] = once(work, device)
            able[name] = work
        except (RuntimeError, torch.OutOfMemoryError) as error:  # a report says who could not, and goes on
            rows[name]["cannot"] = str(error).splitlines()[0][:160]
    begin = time.perf_counter()
    for number in range(_ROUNDS[device]):  # in turn, so that a clock that drifts favours nobody
        if number and (time.perf_counter() - begin) * (number + 1) / number > _SECONDS:
            break
        for name, work in able.items():
            rows[name]["seconds"].append(once(work, device)[0])
    for name in by_blocks(shape):
        if name in able:
            rows[name]["errors"] = verify(shape, tensors, name)
    for by in (TORCH, TRITON):
        if f"the gate by {by}" in able:
            rows[f"the gate by {by}"]["errors"] = verify_gate(shape, tensors, by)
    right = all(e <= 1 for row in rows.values() for e in row.get("errors", {}).values()) and "triton" in able
    return {"right": right, "shape": spoken(shape), "counted": shape.counted(), "rows": rows}


def step(run: Run, tensors: list[Tensor], *, backward: bool) -> Callable[[], None]:
    """One call, with its backward where there is one."""
    *qkv, dout = tensors

    def work() -> None:
        out = run(*qkv)
        if backward:
            torch.autograd.grad(out, qkv, dout)

    return work


def choose(shape: Shape, tensors: list[Tensor], by: str) -> None:
    """Centroids and choice alone."""
    gate(tensors[0], tensors[1], shape.pattern, by)


def once(work: Callable[[], None], device: str) -> tuple[float, int]:
    """Seconds of one call, and the most bytes it held beside its inputs."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    begin = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return seconds, (torch.cuda.max_memory_allocated() - before if device == "cuda" else 0)


def spoken(shape: Shape) -> str:
    """The shape in a line."""
    way = "forward + backward" if shape.backward else "forward"
    heads = f"{shape.query_heads}/{shape.key_heads} heads, D {shape.dim}"
    pattern = f"block {shape.block_size}, top {shape.top_k}"
    return f"{way}, B {shape.batch}, {heads}, {shape.length} tokens, {pattern}, {str(shape.dtype)[6:]}"


def page(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    sections = report["sections"]
    lines = [f"# {next(iter(sections.values()))['machine']['gpu']}", ""]
    lines += ["Written by `tools/gpu_report.sh`. Times are medians; `times` is against the best full attention."]
    for name, found in sections.items():
        facts = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if key != "gpu")
        lines += ["", f"## {name}", "", f"`{found['command']}`; {facts}.", ""]
        lines += _table(found) if "rows" in found else [found["said"], *found["lines"]]
    return "\n".join(lines) + "\n"


def _table(found: dict[str, Any]) -> list[str]:
    counted = found["counted"]
    lines = [
        f"{found['shape']}. Forward by blocks: {counted['reads'] / 1e6:.1f} million reads, "
        f"{counted['read_bytes'] / 1e9:.0f} GB, {counted['operations'] / 1e12:.1f} TFLOP; "
        f"gate {counted['gate_operations'] / 1e12:.1f} TFLOP; "
        f"full attention {counted['full_operations'] / 1e12:.0f} TFLOP.",
        "",
        "| who | ms | range | times | GiB | first call s | errors (at most 1) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = found["rows"]
    best = min((median(r["seconds"]) for r in rows.values() if r["kind"] == "full" and r["seconds"]), default=None)
    for name, row in rows.items():
        if "cannot" in row:
            lines.append(f"| {name} | cannot: {row['cannot']} | | | | | |")
            continue
        ms = [1e3 * s for s in row["seconds"]]
        times = f"{1e3 * best / median(ms):.2f}" if best and row["kind"] == "blocks" else ""
        errors = ", ".join(f"{what} {value:.2f}" for what, value in row.get("errors", {}).items())
        memory = f"{row['bytes'] / 2**30:.2f}" if "bytes" in row else ""
        first = f"{row['first_seconds']:.1f}" if "first_seconds" in row else ""
        lines.append(
            f"| {name} | {median(ms):.1f} | {min(ms):.1f} to {max(ms):.1f} | {times} | {memory} | {first} | {errors} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
