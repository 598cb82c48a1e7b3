"""Measures a GPU: tests, the papers' shapes against full attention, and whether the results are right.

Run it by ``tools/gpu_report.sh``. Every section runs in a process of its own, so that none takes another along. What a
section has so far is kept in the JSON file, and the page is written from that file.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mobazoo.attention.gates import TORCH, TRITON
from mobazoo.files import write_whole
from mobazoo.results import machine
from tools.gpu import auto, flex
from tools.gpu.count import PEAKS
from tools.gpu.measure import Candidate, attempt, measure, right
from tools.gpu.page import page
from tools.gpu.parts import floors, seconds_by_part
from tools.gpu.rivals import PUBLISHED, by_blocks, full, peers, without_routes
from tools.gpu.shapes import SHAPES, gate, inputs, step
from tools.gpu.tiles import tune
from tools.gpu.verify import verify, verify_gate

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("tests", *SHAPES, "auto", "flex", "tiles")
_SECONDS = 240.0  # of measuring a section, after the first call of each candidate
_TUNING = 420.0  # of trying tile sizes, compiling included
_MOST = 570.0  # of a section in all, then it is ended


def main() -> int:
    """Runs the sections that are asked for; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", action="append", choices=SECTIONS, help="may be repeated; default: all")
    parser.add_argument("--dest", type=Path, help="folder of the report (docs/benchmarks; a dry run prints only)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # how a section's process is called
    said = parser.parse_args()
    if not said.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device here; --dry-run tries the script on a CPU")
    device = "cpu" if said.dry_run else "cuda"
    with tempfile.TemporaryDirectory() as folder:
        prints = said.dry_run and said.dest is None
        dest = Path(folder) if prints else said.dest or ROOT / "docs" / "benchmarks"
        kept = dest / f"{'dry-run' if said.dry_run else slug(torch.cuda.get_device_name())}.json"
        fine = [(one if said.here else apart)(name, device, kept) for name in said.section or SECTIONS]
        if prints:
            print(kept.with_suffix(".md").read_text("utf-8"))
    return int(not all(fine))


def one(name: str, device: str, kept: Path) -> bool:
    """A section in this process; whether all is well. What it had before it broke is kept."""
    begin = time.perf_counter()
    found: dict[str, Any] = {"right": False}
    try:
        for part in run(name, device):
            found = part
            keep(name, device, kept, found)
        found["took"] = time.perf_counter() - begin
    except Exception as error:  # the other sections go on, and the page says what happened here
        traceback.print_exc()
        found |= {"right": False, "broke": f"The section broke: {type(error).__name__}: {error}".splitlines()[0]}
    keep(name, device, kept, found)
    return bool(found["right"])


def apart(name: str, device: str, kept: Path) -> bool:
    """A section in a process of its own, which may crash or take too long."""
    dry = ["--dry-run"] if device == "cpu" else []
    command = [sys.executable, "-m", "tools.gpu.report", "--here", "--section", name, "--dest", str(kept.parent), *dry]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=_MOST, check=False).returncode
        ended = f"The section ended with code {code}." if code not in (0, 1) else None
    except subprocess.TimeoutExpired:
        code, ended = 1, f"The section took more than {_MOST:.0f} s and was ended."
    if ended:
        before = load(kept)["sections"].get(name, {})
        mine = before if "took" not in before else {}  # else from an earlier run
        keep(name, device, kept, {**mine, "right": False, "broke": ended})
    return code == 0


def load(kept: Path) -> dict[str, Any]:
    """The report so far."""
    return json.loads(kept.read_text("utf-8")) if kept.exists() else {"sections": {}}


def keep(name: str, device: str, kept: Path, found: dict[str, Any]) -> None:
    """Puts a section into the report and writes both files."""
    report = load(kept)
    command = ["tools/gpu_report.sh", "--section", name, *(["--dry-run"] if device == "cpu" else [])]
    report["sections"][name] = {**found, "command": shlex.join(command), "machine": about(device)}
    report["sections"] = {known: report["sections"][known] for known in SECTIONS if known in report["sections"]}
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, json.dumps(report, indent=1) + "\n")
    write_whole(kept.with_suffix(".md"), page(report))


def run(name: str, device: str) -> Iterator[dict[str, Any]]:
    """A section, more complete each time; ``right`` says whether all is well."""
    if name == "tests":
        yield tests(dry=device == "cpu")
    elif name == "tiles":
        yield from tune(device, _TUNING)
    elif name in SHAPES:
        yield from shapes(name, device)
    else:
        yield from {"auto": auto, "flex": flex}[name].section(device)


def slug(name: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def about(device: str) -> dict[str, str]:
    """What the figures depend on."""
    known = {**machine(), "triton": import_module("triton").__version__}
    if device == "cpu":
        return {**known, "gpu": "none: a dry run"}
    memory = torch.cuda.get_device_properties(0).total_memory >> 30
    return {**known, "gpu": f"{torch.cuda.get_device_name()}, {memory} GiB", "cuda": str(torch.version.cuda)}


def tests(*, dry: bool) -> dict[str, Any]:
    """The tests that `make test-gpu` runs; a dry run only collects them."""
    arguments = ["-o", "addopts=", "-m", "gpu", "--continue-on-collection-errors"]
    arguments += ["--collect-only", "-q"] if dry else []
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_MOST - 30)
    last = (done.stdout.strip() or done.stderr.strip() or "nothing said").splitlines()
    failed = [f"- {line}" for line in last if line.startswith(("FAILED", "ERROR"))]
    return {"right": done.returncode == 0, "said": last[-1].strip("= "), "lines": failed}


def shapes(name: str, device: str) -> Iterator[dict[str, Any]]:
    """One of the papers' shapes: full attention, ours and peers' by blocks, the gate alone, and our passes."""
    shape = SHAPES[name].small() if device == "cpu" else SHAPES[name]
    tensors = inputs(shape, device)
    way = partial(step, tensors=tensors, backward=shape.backward)
    candidates = {who: Candidate("full", way(run)) for who, run in full(device).items()}
    for who, routed in by_blocks(shape, "triton", "flash").items():
        candidates[who] = Candidate("blocks", way(without_routes(routed)), partial(verify, shape, tensors, routed))
    candidates |= {who: Candidate("peer", way(run)) for who, run in peers(shape).items()}
    for by in (TORCH, TRITON):
        alone = partial(gate, tensors[0], tensors[1], shape.pattern, by)
        candidates[f"the gate by {by}"] = Candidate("gate", alone, partial(verify_gate, shape, tensors, by))
    sheet = next((known for known in PEAKS if device == "cuda" and known in torch.cuda.get_device_name()), "H200")
    known = {
        "said": spoken(shape.spoken(), shape.counted()),
        "published": asdict(PUBLISHED[name]),
        "peak": sheet,
        "floor": floors(shape, PEAKS[sheet]),
    }
    for rows in measure(candidates, device, _SECONDS):
        yield {**known, "rows": rows, "right": right(rows, "triton")}
    parts = attempt({}, partial(seconds_by_part, candidates["triton"].work, device))
    yield {**known, "rows": rows, "parts": parts or {}, "right": right(rows, "triton") and parts is not None}


def spoken(shape: str, counted: dict[str, float]) -> str:
    """A shape and what it costs by count."""
    ours = f"{counted['operations'] / 1e12:.1f} TFLOP; gate {counted['gate_operations'] / 1e12:.1f} TFLOP"
    reads = f"{counted['reads'] / 1e6:.1f} million reads, {counted['read_bytes'] / 1e9:.0f} GB"
    theirs = f"{counted['full_operations'] / 1e12:.0f} TFLOP"
    return f"{shape}. Forward by blocks: {reads}, {ours}; full attention {theirs}."


if __name__ == "__main__":
    sys.exit(main())
