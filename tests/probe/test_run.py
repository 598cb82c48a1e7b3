"""``mobazoo probe`` through the command line, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mobazoo.cli import app
from mobazoo.config.data import Data
from mobazoo.config.probe import ProbeRecipe, Suggest
from mobazoo.probe.run import probe
from tests.small import refusal

SMALL = Suggest(8, 2, full=1)


def quiet(*_: Any) -> None: ...


def call(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


def recipe(model: Path, texts: Path, **changes: Any) -> ProbeRecipe:
    base = ProbeRecipe(str(model), Data(str(texts)), [8, 16], [2, 3], 64, suggest=SMALL)
    return replace(base, **changes)


def test_probe_prints_figures_and_rules_that_convert_takes(plain: Path, texts: Path, tmp_path: Path) -> None:
    said = ("length=64", "block_sizes=[8]", "top_k=[2, 3]", "suggest={block_size: 8, top_k: 2, full: 1}")
    result = call("probe", plain, f"data.path={texts}", *said, f"dest={tmp_path / 'probe.json'}")
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows[0][:4] == ["block", "top_k", "keys read", "mass kept"]
    assert [row[:2] for row in rows[1:3]] == [["8", "2"], ["8", "3"]]
    assert rows[4][-2:] == ["loss change", "±"]
    assert [row[0] for row in rows[5:7]] == ["0", "1"]
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found["mobazoo"] == "probe"
    (one, _), suggested = found["probe"]["grid"], found["probe"]["suggested"]
    heads = one["layers"][0]["mass"]
    assert len(heads) == 4
    assert rows[5][1] == f"{100 * sum(heads) / 4:.1f} %"
    assert len(found["probe"]["signal"][0]["layers"][1]["snr"]) == 4
    # What is printed after the tables is a recipe's part.
    text = result.stdout[result.stdout.index("attention:") :].rsplit("\n", 2)[0]
    (tmp_path / "convert.yaml").write_text(f"source: {plain}\ndest: {tmp_path / 'out'}\n{text}\n")
    dry = call("convert", tmp_path / "convert.yaml", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert suggested["rules"][0] == {"layers": ":", "pattern": "moba", "block_size": 8, "top_k": 2}
    assert rows[-1][0].startswith(f"4 texts of 64 tokens, suggested: layers left full {suggested['full'][0]} (")


def test_without_a_suggestion_one_text_is_enough(zoo: Path, texts: Path) -> None:
    found = probe(recipe(zoo, texts, documents=1, suggest=None), quiet)["probe"]
    assert "suggested" not in found
    assert [(one["block_size"], one["top_k"]) for one in found["grid"]] == [(8, 2), (8, 3), (16, 2), (16, 3)]
    few, many = (one["layers"][1]["mass"] for one in found["grid"][:2])
    assert all(a < b for a, b in zip(few, many, strict=True))


def test_dry_run(tmp_path: Path) -> None:
    said = call("probe", "layers", "model=m", "data.path=stdlib", "--dry-run").stdout
    load = "# would load m (no folder here now; a Hub id if there is none by then)\n"
    assert f"# would read up to 16 texts of 2048 tokens from stdlib\n{load}# would look at blocks x" in said
    assert "64 x 3, 64 x 4, 64 x 8, 128 x 3" in said
    (tmp_path / "again.yaml").write_text(said)
    assert call("probe", tmp_path / "again.yaml", "--dry-run").stdout == said


def test_what_cannot_be_is_said_before_anything_is_measured(zoo: Path, texts: Path) -> None:
    words = (
        "probe",
        zoo,
        f"data.path={texts}",
        "length=64",
        "block_sizes=[8]",
        "top_k=[2]",
        "suggest=null",
        "--dry-run",
    )
    before = (zoo / "config.json").read_bytes()
    result = call(*words, f"dest={zoo / 'config.json'}")
    assert result.exit_code == 2, result.output
    assert "config.json: exists and is no earlier result, so it is not replaced" in result.stderr
    assert (zoo / "config.json").read_bytes() == before
    assert "dtype: want one of float32" in call(*words, "dtype=int8").stderr


def test_data_is_the_users() -> None:
    result = call("probe", "some-model")
    assert result.exit_code == 2
    assert "data: missing; give it in the recipe or on the command line as data=" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1}, "probe.length: want a number >= 2, got 1"),
        ({"batch": 0}, "probe.batch: want a number >= 1, got 0"),
        ({"block_sizes": []}, "probe.block_sizes: want numbers >= 1, got []"),
        ({"top_k": [1, 2]}, "probe.top_k: want numbers >= 2, got [1, 2]"),
        (
            {"block_sizes": [32], "suggest": None},
            "probe.length: every setting reads a text of 64 tokens whole; give more than block_size * top_k = 64",
        ),
        ({"suggest": Suggest(32, 2)}, "probe.suggest: block_size 32 and top_k 2 read a text of 64 tokens whole"),
        ({"suggest": Suggest(8, 1)}, "probe.suggest.top_k: want a number >= 2, got 1"),
        ({"suggest": Suggest(8, 2, draws=0)}, "probe.suggest.draws: want a number >= 1, got 0"),
        ({"documents": 3}, "probe.documents: want at least 4 to rank layers on half and check on the rest, got 3"),
        ({"length": 75}, "probe.documents: want at least 4 documents of 75 tokens to rank layers on half of them"),
        ({"length": 102}, "probe.length: want a document of 102 tokens, the longest of data.path="),
    ],
)
def test_errors(changes: dict[str, Any], message: str, plain: Path, texts: Path) -> None:
    assert refusal(probe, recipe(plain, texts, **changes)).startswith(message)


def test_a_text_beyond_the_positions_is_refused(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a" * 200)
    said = refusal(probe, recipe(plain, tmp_path, length=150, suggest=None))
    assert said == f"probe.length: want at most 128, the positions of {plain}, got 150"
