"""The benchmark measures what it says; its figures are not tested, its arithmetic is."""

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from mobazoo import cli
from mobazoo.attention import Full, MoBA
from mobazoo.attention.auto import choose
from mobazoo.attention.kernels import cpu_compiled
from mobazoo.attention.native import build, library
from mobazoo.attention.problem import Problem
from mobazoo.bench import attention, command, decode
from mobazoo.bench.ratios import Bound, Verdict
from tests.factories import spy


def small(**changes: object) -> attention.Case:
    return attention.Case(**{"length": 512, "block_size": 64, "top_k": 2, "head_dim": 16, **changes})  # type: ignore[arg-type]


def test_speedup_is_the_median_of_paired_ratios() -> None:
    result = attention.Result(small(), "flash", full=[2.0, 9.0, 4.0], moba=[1.0, 3.0, 1.0])
    assert result.ratios == [2.0, 3.0, 4.0]
    assert result.speedup == 3.0
    row = result.row()
    assert (row["speedup_min"], row["speedup_max"], row["full_s"], row["moba_s"]) == (2.0, 4.0, 4.0, 1.0)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pair_times_both(dtype: str, backward: bool) -> None:
    result = attention.pair(small(dtype=dtype, backward=backward), rounds=1, repeats=1)
    assert result.backend == "auto: flash"
    assert min(*result.full, *result.moba) > 0


def test_auto_is_named_as_attend_would_choose_it() -> None:
    dense = small(top_k=8)
    chosen, _ = choose(Problem(Full(), "cpu", torch.float32, dense.head_dim, False, dense.length, dense.length))
    assert attention.pair(dense, rounds=1, repeats=1).backend == f"auto: {chosen}"
    assert attention.pair(small(backend="reference"), rounds=1, repeats=1).backend == "reference"


def test_stages_share_out_the_whole() -> None:
    spent = attention.stages(small(length=4096))
    assert list(spent) == ["gate", *(cpu_compiled.STAGES if library() else ["attention"])]
    assert all(seconds > 0 for seconds in spent.values())


def test_stages_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_library", lambda: None)
    spent = attention.stages(small(length=4096))
    assert list(spent) == ["gate", "attention"]
    assert all(seconds > 0 for seconds in spent.values())


def test_command_writes_json_and_markdown(tmp_path: Path) -> None:
    written = [str(tmp_path / "a.json"), str(tmp_path / "a.md")]
    arguments = ["--length", "512", "--block-size", "64", "--top-k", "2", "--rounds", "1"]
    done = CliRunner().invoke(command.app, [*arguments, "--json", written[0], "--markdown", written[1]])
    assert done.exit_code == 0, done.output
    data = json.loads(Path(written[0]).read_text())
    assert data["machine"]["torch"]
    assert data["results"][0]["speedup"] > 0
    assert "| forward, 512 tokens, block 64, top 2, float32 | auto: flash |" in Path(written[1]).read_text()
    again = ["--json", written[0], "--markdown", written[1], "--dry-run"]
    assert CliRunner().invoke(command.app, again).exit_code == 0  # what it wrote may go
    for option, path in zip(("--json", "--markdown"), written, strict=True):
        Path(path).write_text('{"results": "of somebody else"}')
        refused = CliRunner().invoke(command.app, [option, path, "--dry-run"])
        assert refused.exit_code == 2
        why = "exists and is no earlier result, so it is not replaced; choose another dest"
        assert refused.stderr == f"error: {path}: {why}\n"


SMALL = decode.Sizes(layers=2, query_heads=4, key_heads=2, head_dim=16, pattern=MoBA(32, 3))


def test_decode_suite_writes_its_page(tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=200)
    decode.run(console, 1, tmp_path / "a.json", tmp_path / "a.md", False, SMALL, scale=128)
    rows = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [row["bound"] for row in rows] == [">= 5", ">= 10", "<= 1.5", "", "<= 1.3"]
    assert min(t for row in rows for t in row["ours"] + row["theirs"]) > 0
    page = (tmp_path / "a.md").read_text()
    assert "| a token at 1K, decode: moba |" in page
    # Two earlier blocks for each of two heads, and the own one: 3 to 5 blocks of 32.
    assert re.search(r"dense 0 MiB, sparse 0 MiB \([345]\.\d different blocks of 32 per layer and key head\)", page)


def test_decode_steps_do_the_same_work_as_their_rivals() -> None:
    step = decode.Step(SMALL, 64, 4)
    inputs = step.inputs()
    routes = step.sparse(inputs)
    assert decode.blocks_read(routes, 2) == 2 * 2 * 3  # 64 tokens: both blocks before the own, for every head
    assert [layer.get_seq_length() for layer in step.layers] == [65, 65]
    for dense in (step.full, step.folded, step.shared):
        dense(inputs)
    q, k, v = (SMALL.draw(n, 200) for n in (4, 2, 2))
    whole, chunked = (decode.prefill(SMALL, q, k, v, chunk) for chunk in (200, 64))
    torch.testing.assert_close(whole, chunked)


def test_a_ratio_is_read_with_its_bound() -> None:
    fast = decode.Line("a", "b", ours=[1.0, 2.0, 1.0], theirs=[5.0, 6.0, 9.0], bound=Bound(">=", 5))
    slow = decode.Line("a", "b", ours=[3.0], theirs=[2.0], bound=Bound("<=", 1.4))
    assert (fast.ratios, slow.ratios) == ([5.0, 3.0, 9.0], [1.5])
    assert fast.cells() == ("a", "1.00", "b", "6.00", "5.00", "3.00 to 9.00", ">= 5")
    assert slow.cells()[-1] == "<= 1.4: missed"


def test_decode_suite_dry_run_times_nothing() -> None:
    done = CliRunner().invoke(command.app, ["--suite", "decode", "--dry-run"])
    assert "would time a token against caches of 16K and 128K tokens" in done.output
    assert "would time a prompt of 64K tokens at once and by 4K" in done.output


def test_unknown_suite_is_one_line() -> None:
    done = CliRunner().invoke(command.app, ["--suite", "gpu"])
    assert done.exit_code == 2
    assert "unknown suite 'gpu'; known: cpu, decode" in done.output


def test_the_suite_holds_the_bounds() -> None:
    cases = list(attention.suite_cpu())
    assert (attention.Case(), Bound(">=", 8.5)) in cases
    assert {case.dtype for case, _ in cases} == {"float32", "bfloat16"}
    assert {case.length for case, _ in cases} >= {768, 1536, 32768, 65536}


def test_growth_is_time_per_token_over_that_of_half_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([9.0, 9.0, 4.0, 10.0, 4.0, 8.0])  # warm-up, then two rounds
    monkeypatch.setattr(attention, "seconds", lambda work: (work(), next(clock))[1])
    lengths = spy(monkeypatch, attention, "attend", lambda given, _: given[0].shape[2])
    found = attention.growth(attention.Case(length=256, block_size=16), rounds=2, repeats=1)
    assert lengths == [128, 256] * 3
    assert found.ratios == [1.25, 1.0]
    assert found.line() == "forward, 256 tokens, block 16, top 3, float32: +12 % (+0 % to +25 %); as a ratio <= 1.15"
    assert (found.row()["bound"], found.row()["missed"]) == ("<= 1.15", False)
    assert replace(found, ratios=[1.2]).line().endswith("; as a ratio <= 1.15: missed")


def test_a_bound_may_refer_to_the_same_case_in_float32() -> None:
    case = attention.Case()
    wide, narrow = (
        attention.Result(replace(case, dtype=dtype), "flash", [ours], [1.0])
        for dtype, ours in (("float32", 10.0), ("bfloat16", 8.0))
    )
    share = Bound(">=", 0.9, of="float32's")
    results: list[attention.Timed] = [(wide, Bound(">", 10)), (narrow, share)]
    assert [str(attention.verdict(result, bound, results)) for result, bound in results] == [
        "> 10: missed",
        ">= 0.9 of float32's: missed",
    ]
    assert not attention.verdict(replace(narrow, full=[9.0]), share, results).missed
    assert attention.verdict(wide, None, results) == Verdict()


@pytest.mark.parametrize("least", [0.0, 1e9])
def test_a_suite_that_misses_a_bound_ends_with_one(
    least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then its page is written."""
    case = attention.Case(length=64, block_size=8)
    monkeypatch.setattr(command, "suite_cpu", lambda: [(case, Bound(">=", least))])
    monkeypatch.setattr(command, "suite_growth", list)
    page, data = tmp_path / "cpu.md", tmp_path / "cpu.json"
    words = ["--suite", "cpu", "--rounds", "1", "--markdown", str(page), "--json", str(data)]
    done = CliRunner().invoke(cli.app, ["bench", *words])
    assert done.exit_code == (1 if least else 0)
    assert ("missed 1 of the suite's bounds" in done.stderr) == bool(least)
    assert ("| >= 1e+09: missed |" in page.read_text()) == bool(least)
    assert [row["missed"] for row in json.loads(data.read_text())["results"]] == [bool(least)]


def test_the_page_names_the_bounds_of_the_suite() -> None:
    page = (Path(__file__).parents[1] / "docs" / "benchmarks" / "cpu.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in page if line.startswith("| forward")]
    wanted = {(case.label(), str(bound or "")) for case, bound in attention.suite_cpu()}
    assert {(row[0], row[6].removesuffix(": missed") if len(row) > 6 else "") for row in rows} == wanted
