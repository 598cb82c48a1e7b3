"""The GPU report's script from end to end on a CPU: sections one by one, page and JSON, and that errors show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu_report.sh"), *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_dry_run_by_sections(tmp_path: Path) -> None:
    sections = ("64k", "1m", "tiles")
    named = [word for section in sections for word in ("--section", section)]
    done = report("--dry-run", *named, "--dest", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads((tmp_path / "dry-run.json").read_text())["sections"]
    assert list(said) == [*sections]
    for section in (said["64k"], said["1m"]):
        assert {"SDPA", "triton", "flash"} <= set(section["rows"])
        for backend in ("triton", "flash"):
            errors = section["rows"][backend]["errors"]
            assert set(errors) == ({"out", "dq", "sum of dv", "sum of k dk"} if section is said["64k"] else {"out"})
            assert 0 < max(errors.values()) <= 1
        for by in ("torch", "triton"):
            errors = section["rows"][f"the gate by {by}"]["errors"]
            assert 0 < errors["means"] <= 1
            assert errors["choice"] <= 1
    page = (tmp_path / "dry-run.md").read_text()
    assert "forward + backward, B 1, 1/1 heads" in page
    assert "forward, B 1, 4/1 heads" in page
    assert page.count("| triton |") == 2
    assert [line.split(" | ")[0] for line in said["tiles"]["lines"] if " | 16 | 2 | " in line] == [
        "| forward",
        "| backward",
        "| keys",
        "| gate",
    ]
    assert said["tiles"]["lines"][-1] in ("The default stays.", "```")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so() -> None:
    done = report("--section", "64k")
    assert done.returncode == 2
    assert "no CUDA device here; --dry-run" in done.stderr
