"""The GPU report from end to end on a CPU: sections one by one, page and JSON; what fails ends nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.gpu import report as gpu_report
from tools.gpu import tiles as gpu_tiles

ROOT = Path(__file__).parents[2]
MEASURED = ("64k", "1m", "auto", "flex", "tiles")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter beside a GPU")


def by_hand(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu_report.sh"), *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dry run of every section that measures; 512k is 64k then."""
    kept = tmp_path_factory.mktemp("report") / "new" / "dry-run.json"
    fine = [gpu_report.one(name, "cpu", kept) for name in reversed(MEASURED)]
    assert fine == [True] * len(MEASURED)
    return kept


@pytest.fixture(scope="module")
def sections(kept: Path) -> dict[str, Any]:
    return json.loads(kept.read_text())["sections"]


@pytest.fixture(scope="module")
def page(kept: Path) -> str:
    return kept.with_suffix(".md").read_text()


@interpreted
def test_sections_gather_in_one_report(sections: dict[str, Any], page: str) -> None:
    assert list(sections) == [*MEASURED]
    assert "**A dry run: tiny shapes on a CPU" in page
    for name, section in sections.items():
        assert f"`tools/gpu_report.sh --section {name} --dry-run`; {section['took']:.0f} s; cpu" in page
        assert {"torch", "triton", "date", "commit"} <= set(section["machine"])


@interpreted
def test_shapes(sections: dict[str, Any], page: str) -> None:
    for name in ("64k", "1m"):
        rows = sections[name]["rows"]
        for backend in ("triton", "flash"):
            errors = rows[backend]["errors"]
            assert set(errors) == ({"out", "dq", "sum of dv", "sum of k dk"} if name == "64k" else {"out"})
            assert 0 < max(errors.values()) <= 1
        for by in ("torch", "triton"):
            errors = rows[f"the gate by {by}"]["errors"]
            assert 0 < errors["means"] <= 1
            assert errors["choice"] <= 1
        assert "not installed here" in rows["FlashMoBA (flash_moba)"]["cannot"]
        assert "not installed here" in rows["MoBA (moba)"]["cannot"]
        assert set(sections[name]["parts"]) == set(sections[name]["floor"])
    assert "forward + backward, B 1, 1/1 heads" in page
    assert "forward, B 1, 4/1 heads" in page
    assert "| *published, not measured here: FlashMoBA* | | | *5.6* | | | *H100; arXiv 2511.11571," in page
    assert "| *published, not measured here: MoBA* | | | *6.5* |" in page
    passes = [
        line.split(" | ")[0]
        for line in page.split("Passes of")[1].split("## ")[0].splitlines()
        if line.startswith("| ")
    ]
    assert passes[-3:] == ["| dk and dv", "| all", "| what no pass took"]


@interpreted
def test_targets_are_a_table(page: str) -> None:
    lines = page.split("## targets")[1].split("##")[0].strip().splitlines()[2:]
    state = [line.split(" | ")[0].strip("| ") + ": " + line.split(" | ")[3] for line in lines]
    assert state[0] == "64k: times FlashAttention-2: missed"
    assert state[1] == "512k: times FlashAttention-2: not measured"
    assert state[2] == "1m: times FlashAttention-2: missed"
    assert state[3:6] == [f"{name}: memory of FlashAttention-2's: not measured" for name in ("64k", "512k", "1m")]
    assert state[6].startswith("`auto`: time of full attention's beyond 4 windows: m")  # met or missed
    assert state[7].startswith("`auto`: time of full attention's where exact: m")


@interpreted
def test_auto_flex_and_tiles(sections: dict[str, Any]) -> None:
    cases = {case["windows"]: case for case in sections["auto"]["cases"]}
    assert [case["took"] for case in cases.values()] == ["sdpa", "sdpa", "flash"]
    assert max(cases) > 4
    assert set(cases[0.5]["rows"]) == {"SDPA", "auto", "triton"}
    rows, lines = sections["flex"]["rows"], sections["flex"]["lines"]
    for name in ("flex", "flex_routed"):
        for options in ("default", "128 x 64, 8 warps, 2 stages", "queries agree"):
            assert "UnsupportedError" in rows[f"{name}, {options}"]["cannot"]  # a CPU has no backward there
    assert rows["flash, aten"]["errors"]["dq"] <= 1
    assert "random queries: flex reads 100% of the causal tiles, 0% of them marked full" in sections["flex"]["said"]
    assert lines == ["FlexAttention's own options stay."]
    tried = [line.split(" | ")[0] for line in sections["tiles"]["lines"] if " | 16 | 2 | " in line]
    assert tried == ["| forward", "| backward", "| keys", "| gate"]
    assert sections["tiles"]["lines"][-1] in ("The default stays.", "```")


@interpreted
def test_a_default_that_fails_is_a_line_of_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def works(*_: object) -> dict[str, Any]:
        return {"forward": lambda: [torch.ones(2)]}

    monkeypatch.setattr(gpu_tiles, "works", works)
    *_, found = gpu_tiles.tune("cpu", 1.0)
    assert not found["right"]
    assert "Failed: keys, head dim 16: KeyError: 'keys'." in found["lines"]
    assert found["lines"][2].startswith("| forward | 16 | 2 |")


def broken(_: str, device: str) -> Iterator[dict[str, Any]]:
    yield {"right": True, "said": f"on {device}"}
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried much")


@interpreted
def test_a_section_that_breaks_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "a.json"
    gpu_report.keep("tests", "cpu", kept, {"right": True, "said": "3 passed", "took": 1.0, "lines": []})
    monkeypatch.setattr(gpu_report, "run", broken)
    assert not gpu_report.one("64k", "cpu", kept)
    page = kept.with_suffix(".md").read_text()
    assert "3 passed" in page
    assert "**The section broke: OutOfMemoryError: CUDA out of memory.**\n\non cpu" in page
    assert "unfinished" in page


def slow(*_: Any, timeout: float, **__: Any) -> Any:
    raise subprocess.TimeoutExpired("x", timeout)


@interpreted
@pytest.mark.parametrize(
    ("end", "says"),
    [
        (lambda *_, **__: subprocess.CompletedProcess("x", -11), "The section ended with code -11."),
        (slow, "The section took more than 570 s and was ended."),
    ],
    ids=["crash", "time"],
)
def test_a_section_that_is_ended(
    end: Callable[..., Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "a.json"
    monkeypatch.setattr(subprocess, "run", end)
    monkeypatch.setattr(gpu_report, "about", lambda _: {"gpu": "one"})
    gpu_report.keep("1m", "cuda", kept, {"right": True, "said": "first calls", "rows": {}})
    gpu_report.keep("64k", "cuda", kept, {"right": True, "said": "of another day", "took": 3.0})
    for name in ("1m", "64k"):
        assert not gpu_report.apart(name, "cuda", kept)
    page = kept.with_suffix(".md").read_text()
    assert page.count(f"**{says}**") == 2
    assert "first calls" in page
    assert "of another day" not in page


@interpreted
@pytest.mark.slow
def test_by_hand_in_processes(tmp_path: Path) -> None:
    done = by_hand("--dry-run", "--section", "tiles", "--section", "1m", "--dest", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(json.loads((tmp_path / "dry-run.json").read_text())["sections"]) == ["1m", "tiles"]


@interpreted
def test_without_a_gpu_it_says_so() -> None:
    done = by_hand("--section", "64k")
    assert done.returncode == 2
    assert "no CUDA device here; --dry-run" in done.stderr
