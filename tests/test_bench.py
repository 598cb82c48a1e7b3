"""The benchmark measures what it says; its figures are not tested, its arithmetic is."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mobazoo import bench


def small(**changes: object) -> bench.Case:
    return bench.Case(**{"length": 512, "block_size": 64, "top_k": 2, "head_dim": 16, **changes})  # type: ignore[arg-type]


def test_speedup_is_the_median_of_paired_ratios() -> None:
    result = bench.Result(small(), "flash", full=[2.0, 9.0, 4.0], moba=[1.0, 3.0, 1.0])
    assert result.ratios == [2.0, 3.0, 4.0]
    assert result.speedup == 3.0
    row = result.row()
    assert (row["speedup_min"], row["speedup_max"], row["full_s"], row["moba_s"]) == (2.0, 4.0, 4.0, 1.0)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pair_times_both(dtype: str, backward: bool) -> None:
    result = bench.pair(small(dtype=dtype, backward=backward), rounds=1, repeats=1)
    assert result.backend == "auto: flash"
    assert min(*result.full, *result.moba) > 0


def test_auto_is_named_as_attend_would_choose_it() -> None:
    assert bench.pair(small(top_k=8), rounds=1, repeats=1).backend == "auto: sdpa"
    assert bench.pair(small(backend="reference"), rounds=1, repeats=1).backend == "reference"


def test_stages_share_out_the_whole() -> None:
    spent = bench.stages(small(length=4096))
    assert list(spent) == ["gate", "own blocks", "sort", "gather", "routed kernel", "merge and the rest"]
    assert spent["gate"] > 0
    assert spent["own blocks"] > 0
    assert spent["gather"] > 0


def test_command_writes_json_and_markdown(tmp_path: Path) -> None:
    written = [str(tmp_path / "a.json"), str(tmp_path / "a.md")]
    arguments = ["--length", "512", "--block-size", "64", "--top-k", "2", "--rounds", "1"]
    done = CliRunner().invoke(bench.app, [*arguments, "--json", written[0], "--markdown", written[1]])
    assert done.exit_code == 0, done.output
    data = json.loads(Path(written[0]).read_text())
    assert data["machine"]["torch"]
    assert data["results"][0]["speedup"] > 0
    assert "| forward, 512 tokens, block 64, top 2, float32 | auto: flash |" in Path(written[1]).read_text()


def test_unknown_suite_is_one_line() -> None:
    done = CliRunner().invoke(bench.app, ["--suite", "gpu"])
    assert done.exit_code == 2
    assert "unknown suite 'gpu'; known: cpu, decode" in done.output


def test_the_suite_holds_the_bounds() -> None:
    cases = list(bench.suite_cpu())
    assert (bench.Case(), ">= 8.5") in cases
    assert {case.dtype for case, _ in cases} == {"float32", "bfloat16"}
    assert {case.length for case, _ in cases} >= {768, 1536, 32768, 65536}
