"""Attention timed by recipe: contenders compute what their names say, nothing is left out without a word."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from mobazoo.attention import Full, MoBA, attend
from mobazoo.bench import limits, sweep
from mobazoo.bench.limits import Limits, available, peak_of
from mobazoo.bench.points import Point
from mobazoo.bench.sweep import inputs, time_sweep
from mobazoo.cli import app
from mobazoo.config.recipe import load_recipe
from mobazoo.config.shipped import RECIPES, shipped
from mobazoo.config.sweep import Blocks, SweepRecipe
from mobazoo.errors import InputError
from mobazoo.results import machine

SMALL = SweepRecipe([512], [Blocks(3, 32)], head_dim=16, rounds=2, device="cpu")
SHIPPED = [
    name for name, source in shipped(RECIPES).items() if name.startswith("bench/") and "\nmodel:" not in source.text
]


def call(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


def point(mode: str = "prefill", **changes: Any) -> Point:
    recipe = replace(SMALL, **changes)
    return Point(recipe, mode, recipe.dtypes[0], recipe.blocks[0], recipe.lengths[0])


def quiet(*_: Any) -> None: ...


@pytest.mark.parametrize("mode", ["prefill", "train", "decode"])
@pytest.mark.parametrize("name", ["sdpa", "naive", "MoBA, auto", "MoBA, flash"])
def test_contenders_compute_what_their_names_say(name: str, mode: str) -> None:
    at = point(mode)
    q, k, v, *_ = (x.detach() for x in inputs(at, "cpu"))
    assert q.shape[2] == (1 if mode == "decode" else 512)
    found = sweep._computes(name, at, q, k)(q, k, v)
    want = attend(q, k, v, pattern=Full() if name == "sdpa" else MoBA(32, 3), backend="reference")
    torch.testing.assert_close(found, want)


def test_training_takes_gradients_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *said: (seen.append(len(said[1])), grad(*said))[1])
    for mode in ("prefill", "train"):
        at = point(mode)
        sweep.contender("MoBA, auto", at, inputs(at, "cpu"))()
    assert seen == [3]


# What a recipe is for, and a size at which a CPU does it in a moment.
PAPERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bench/moba-paper": (
        {"lengths": [32768], "blocks": [Blocks(3, 2048)], "query_heads": 1, "against": ["naive", "sdpa"]},
        ["lengths=[512]", "blocks=[{block_size: 32, top_k: 3}]"],
    ),
    "bench/flashmoba": (
        {"lengths": [4096 << i for i in range(8)], "blocks": [Blocks(8, 128)], "batch": 2, "key_heads": 16},
        ["lengths=[160, 256]", "query_heads=2", "key_heads=2", "blocks=[{block_size: 16, top_k: 8}]"],
    ),
    "bench/million": (
        {"lengths": [131072 << i for i in range(4)], "blocks": [Blocks(12, 4096)], "query_heads": 32, "key_heads": 8},
        ["lengths=[512]", "query_heads=4", "key_heads=1", "blocks=[{block_size: 16, top_k: 12}]"],
    ),
    "bench/constant-sparsity": (
        {"blocks": [Blocks(3, count=64)], "head_dim": 128},
        ["lengths=[256, 512]"],
    ),
}


def test_every_shipped_sweep_is_here() -> None:
    assert list(PAPERS) == sorted(SHIPPED, key=list(PAPERS).index)
    assert load_recipe("constant-sparsity", [], SweepRecipe).lengths[-1] == 10 << 20


@pytest.mark.parametrize("name", SHIPPED)
def test_the_papers_shapes_run_at_reduced_lengths(name: str, tmp_path: Path) -> None:
    shape, smaller = PAPERS[name]
    recipe = load_recipe(name, [], SweepRecipe)
    assert {key: getattr(recipe, key) for key in shape} == shape
    assert shipped(RECIPES)[name].command.startswith(f"mobazoo {name.replace('/', ' ')}")
    result = call("bench", name, *smaller, "rounds=1", "device=cpu", f"dest={tmp_path / 'a.json'}")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "a.json").read_text())["sweep"]
    assert {row["mode"] for row in rows} == set(recipe.modes)
    for row in rows:
        timed = {run["name"]: run for run in row["runs"]}
        assert timed["MoBA, auto"]["speedup"] > 0
        assert "needs flash_attn" in timed.get("flash-attn", {"skipped": "needs flash_attn"})["skipped"]
        assert 0 < row["share_read"] < 1
        assert (row["tile_density"] is None) == (row["mode"] == "decode")
    if "count" in str(recipe.blocks) and recipe.blocks[0].count:
        assert [row["length"] // row["block_size"] for row in rows] == [64, 64]
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert lines[0][:5] == ["mode", "dtype", "tokens", "blocks", "what"]
    assert lines[-1][0].startswith(f"{sum('median_s' in run for row in rows for run in row['runs'])} of ")


def test_ratios_belong_to_their_round() -> None:
    timed = {"sdpa": [2.0, 9.0, 4.0], "MoBA, auto": [1.0, 3.0, 1.0]}
    found = sweep._figures(timed, "MoBA, auto", "sdpa")
    assert (found["median_s"], found["speedup"], found["speedup_min"], found["speedup_max"]) == (1.0, 3.0, 2.0, 4.0)
    assert "speedup" not in sweep._figures(timed, "sdpa", "sdpa")


def test_what_does_not_fit_is_left_out_and_said() -> None:
    # The dense mask takes 14 bytes a pair and head: 14 MiB; everything else is a few hundred KiB.
    (row,) = time_sweep(replace(SMALL, against=["naive", "sdpa"], memory=0.005), quiet)["sweep"]
    naive, sdpa, moba = row["runs"]
    assert naive == {"name": "naive", "skipped": "needs about 0.014 GiB, there are 0.005 GiB"}
    assert "speedup" not in sdpa
    assert moba["against"] == "sdpa"  # the first that was timed
    with pytest.raises(
        InputError, match=r"bench: nothing of it could be timed; needs about .* GiB, there are 1e-05 GiB"
    ):
        time_sweep(replace(SMALL, memory=1e-5), quiet)


def test_bytes_by_hand() -> None:
    # 512 tokens, 4 query and 2 key heads of 16 in float32: q and out, k and v.
    tensors = 2 * 4 * 16 * (4 + 2) * 512
    assert point().bytes_needed("sdpa") == tensors
    assert point("train").bytes_needed("sdpa") == 2 * tensors
    assert point().bytes_needed("naive") == tensors + 14 * 4 * 512 * 512
    assert point("decode").bytes_needed("sdpa") == 2 * 4 * 16 * (4 + 2 * 512)
    assert point().bytes_needed("MoBA, reference") > point().bytes_needed("naive")
    assert point().bytes_needed("MoBA, flex") > point().bytes_needed("MoBA, auto") > tensors


def test_what_would_take_too_long_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(longest=10.0)
    short, long = point(), point(lengths=[2048])
    assert limits.unknown(short, "naive")
    limits.learn(short, "naive", 1.0)
    assert limits.too_slow(short, "naive") is None
    assert limits.too_slow(long, "naive") == "would take about 16 s a call, longest is 10 s"
    assert limits.unknown(short, "sdpa")
    assert limits.too_slow(long, "sdpa") is None
    # A clock that says 10 ms for any call: at 1024 tokens, so 64 times that for what is dense, and some 24 for blocks.
    monkeypatch.setattr(sweep, "clocked", lambda call, device: 0.01)
    far = replace(SMALL, lengths=[1 << 13], query_heads=1, key_heads=1, longest=0.5, memory=64.0)
    naive, sdpa, moba = time_sweep(replace(far, against=["naive", "sdpa"]), quiet)["sweep"][0]["runs"]
    assert naive["skipped"] == "would take about 0.64 s a call, longest is 0.5 s"
    assert sdpa["skipped"] == "would take about 0.639 s a call, longest is 0.5 s"
    assert moba["median_s"] == 0.01


def test_an_interrupted_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(SMALL, lengths=[64, 96, 128], rounds=1, dest=str(tmp_path / "a.json"))
    row, timed, rates = sweep._row, list[int](), list[bool]()

    def stopped(at: Point, device: str, limits: Limits) -> dict[str, Any]:
        if len(timed) == 2:
            timed.append(0)
            raise KeyboardInterrupt
        timed.append(at.length)
        rates.append(limits.unknown(at, "sdpa"))
        return row(at, device, limits)

    monkeypatch.setattr(sweep, "_row", stopped)
    with pytest.raises(KeyboardInterrupt):
        time_sweep(recipe, quiet)
    assert [path.name for path in tmp_path.iterdir()] == [".a.json.parts"]
    for changes, said in (({"rounds": 2}, "rounds: 1 there, 2 here"), ({}, "commit: 'x' there, '.*' here")):
        with monkeypatch.context() as other:
            about = {**machine(), **({} if changes else {"commit": "y"})}
            other.setattr(sweep, "machine", lambda about=about: about)
            with pytest.raises(InputError, match=said.replace("'x'", repr(machine()["commit"]))):
                time_sweep(replace(recipe, **changes), quiet)
    found = time_sweep(recipe, quiet)["sweep"]
    assert timed == [64, 96, 0, 128]
    assert rates == [True, False, False]  # what was timed before still says how long the next may take
    assert [at["length"] for at in found] == [64, 96, 128]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text())["sweep"] == found


def test_a_sweep_of_which_nothing_fits_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing of it could be timed"):
        time_sweep(replace(SMALL, memory=1e-5, dest=str(tmp_path / "a.json")), quiet)
    assert list(tmp_path.iterdir()) == []


def test_a_backend_that_cannot_says_why() -> None:
    (row,) = time_sweep(replace(SMALL, backends=["sdpa", "auto"]), quiet)["sweep"]
    assert "sdpa computes full attention only" in row["runs"][1]["skipped"]


def test_memory_is_that_of_the_call() -> None:
    before = peak_of(lambda: None, "cpu")
    if before is None or available("cpu") is None:
        pytest.skip("this system does not say")
    kept: list[torch.Tensor] = []
    grown = peak_of(lambda: kept.append(torch.ones(256 << 18)), "cpu")
    assert grown is not None
    assert 250 << 20 <= grown <= 300 << 20


def test_a_control_groups_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "available_memory", lambda: 5 << 20)
    (row,) = time_sweep(replace(SMALL, against=["naive", "sdpa"], rounds=1), quiet)["sweep"]
    assert row["runs"][0]["skipped"] == "needs about 0.014 GiB, there are 0.00488 GiB"


def test_memory_that_runs_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first call of all, which is at a short length, too."""
    computes = sweep._computes

    def fails(name: str, at: Point, *given: Any) -> Any:
        def full(*_: Any) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

        return full if name == "naive" else computes(name, at, *given)

    monkeypatch.setattr(sweep, "_computes", fails)
    (row,) = time_sweep(replace(SMALL, against=["naive", "sdpa"], rounds=1), quiet)["sweep"]
    assert [run.get("skipped") for run in row["runs"]] == ["ran out of memory", None, None]


def test_no_peak_is_said_where_it_cannot_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak since the process began would be taken for the call's."""
    monkeypatch.setattr(limits, "_REFERENCES", tmp_path / "none" / "clear_refs")
    assert peak_of(lambda: None, "cpu") is None


def test_dry_run_is_the_recipe_again(tmp_path: Path) -> None:
    said = call("bench", "moba-paper", "dest=a.json", "--dry-run").stdout
    assert (
        "# would time prefill of 32768 tokens in bfloat16\n# would compare naive, sdpa, MoBA by auto, 3 rounds" in said
    )
    assert "# would write a.json" in said
    (tmp_path / "again.yaml").write_text(said)
    assert call("bench", tmp_path / "again.yaml", "--dry-run").stdout == said


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("modes=[prefil]", "bench.modes: unknown 'prefil'; did you mean 'prefill'?"),
        ("dtypes=[int8]", "bench.dtypes: unknown 'int8'; known: float32, bfloat16, float16"),
        ("against=[sdp]", "bench.against: unknown 'sdp'; did you mean 'sdpa'?"),
        ("backends=[flesh]", "bench.backends: unknown backend 'flesh'; did you mean 'flash'?"),
        ("backends=[]", "bench.backends: want at least one, got none"),
        ("lengths=[0]", "bench.lengths: want numbers of tokens >= 1, got [0]"),
        ("rounds=0", "bench.rounds: want a number >= 1, got 0"),
        ("query_heads=3", "bench.query_heads: want a multiple of key_heads=16, got 3"),
        ("longest=0", "bench.longest: want a number above 0, got 0"),
        ("blocks=[{top_k: 3}]", "bench.blocks[0]: want one of block_size and count, got none"),
        ("blocks=[{top_k: 3, count: 4, block_size: 4}]", "bench.blocks[0]: want one of block_size and count, got both"),
        ("blocks=[{top_k: 0, count: 4}]", "bench.blocks[0].top_k: want a number >= 1, got 0"),
        ("device=cuda", "bench.device: want auto or cpu, there is no GPU here, got 'cuda'"),
        ("lenght=[4]", "unknown key 'lenght'; did you mean 'lengths'?"),
    ],
)
def test_errors_are_one_line(word: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = call("bench", "flashmoba", word)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
