"""eval, bench by recipe, report and generate as stages: through the command line, and one after another in a run."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mobazoo import extras
from mobazoo.cli import app
from mobazoo.config.run import RunRecipe
from mobazoo.config.shipped import RECIPES, shipped
from tests.small import plain_checkpoint, text_folder, zoo_checkpoint


def call(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a zoo checkpoint ``zoo`` and texts ``texts``."""
    folder = tmp_path_factory.mktemp("place")
    zoo_checkpoint(plain_checkpoint(folder / "plain"), folder / "zoo")
    text_folder(folder / "texts")
    return folder


def test_eval_prints_settings_side_by_side(place: Path, tmp_path: Path) -> None:
    dest = tmp_path / "loss.json"
    common = ("eval", "loss", f"model={place / 'zoo'}", f"data.path={place / 'texts'}", "length=64")
    result = call(*common, "loss.trailing=16", f"dest={dest}")
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows[0][:4] == ["setting", "mean loss", "±", "last 16"]
    assert [row[0] for row in rows[1:3]] == ["full", "moba"]
    assert rows[1][-1] == "100 %"
    assert rows[3] == [f"4 texts of 64 tokens, loss full {rows[1][1]}, moba {rows[2][1]}"]
    assert "You are using a model of type" not in result.stderr
    said = json.loads(dest.read_text())["loss"]["settings"]
    assert f"{said['moba']['mean']['mean']:.3f}" == rows[2][1]


def test_dry_runs_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = call("eval", "loss", "model=m", "data.path=stdlib", "dest=a.json", "--dry-run").stdout
    assert "# would read up to 64 texts of 1024 tokens from stdlib" in said
    assert "# would compare the settings full, moba\n# would write a.json" in said
    (tmp_path / "again.yaml").write_text(said)
    assert call("eval", "again.yaml", "--dry-run").stdout == said
    (tmp_path / "again.yaml").unlink()
    said = call("bench", "prefill", "model=m", "lengths=[8, 16]", "--dry-run").stdout
    absent = "would load m (no folder here now; a Hub id if there is none by then)"
    assert f"# {absent}\n# would time prefill of 8, 16 tokens, 3 rounds" in said
    assert "# would write runs/x/report.html" in call("report", "runs/x", "--dry-run").stdout
    said = call("generate", "sample", "model=m", "prompt=a", "dest=b.json", "--dry-run").stdout
    assert f"# {absent}\n# would write up to 128 tokens after the prompt\n# would write b.json" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "loss", "model=zoo", "data.path=texts", "settings.a=[{layers: 7, pattern: full}]"], "layer 7"),
        (["eval", "loss", "model=bare", "data.path=texts"], "has no tokenizer"),
        (["bench", "prefill", "model=zoo", "attention=[{backend: sdpa}]"], "backend 'sdpa' cannot do this"),
        (["bench", "prefill", "model=texts"], "not a checkpoint folder"),
        (["generate", "zoo", "attention=[{layers: 7, pattern: full}]"], "layer 7"),
    ],
)
def test_dry_runs_check_a_folder_that_is_here(
    words: list[str], message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    if "model=bare" in words and not Path("bare").exists():
        Path("bare").mkdir()
        for name in ("config.json", "model.safetensors"):
            Path("bare", name).hardlink_to(Path("zoo", name))
    result = call(*words, "--dry-run")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_bench_finds_its_recipe_after_the_options() -> None:
    said = call("bench", "--dry-run", "prefill", "model=m")
    assert said.exit_code == 0, said.output
    assert "# would time prefill of" in said.stdout
    assert "mobazoo bench prefill model=" in " ".join(call("bench", "prefill", "--help").stdout.split())


@pytest.mark.parametrize(
    ("library", "words", "message"),
    [
        ("accelerate", ["train", "continue", "model=m", "dest=d"], "train: needs accelerate, .*'mobazoo\\[train\\]'"),
        (
            "peft",
            ["train", "continue", "model=m", "dest=d", "lora={rank: 2}"],
            "train.lora: needs peft, .*mobazoo\\[lora",
        ),
        (
            "datasets",
            ["eval", "loss", "model=m", "data={path: a/b, format: hub}"],
            "needs datasets, .*mobazoo",
        ),
        ("pyarrow", ["tokenizer", "stdlib", "dest=d", "data={path: a, format: parquet}"], "needs pyarrow, .*mobazoo"),
        ("matplotlib", ["report", "runs/x"], "report: needs matplotlib, .*'mobazoo\\[report\\]'"),
        ("matplotlib", ["run", "quickstart", "folder=f"], r"stage 10 \(report\): report: needs matplotlib, "),
    ],
)
def test_a_missing_library_is_said_before_anything_begins(
    library: str, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == library else True)
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr)
    assert f"{library}, which is not here; pip install '" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_bench_takes_a_recipe_or_options(place: Path) -> None:
    result = call("bench", "prefill", f"model={place / 'zoo'}", "lengths=[16, 64]", "rounds=1")
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows[:3]] == ["tokens", "16", "64"]
    assert rows[1][5] == "100 %"
    assert rows[3][0].startswith("prefill of 64 tokens ")
    help_text = " ".join(call("bench", "--help").stdout.split())
    assert "mobazoo bench --length" in help_text
    assert "mobazoo bench prefill model=" in help_text
    assert "would time forward, 1024 tokens" in call("bench", "--dry-run", "--length", 1024).stdout


def test_stages_measure_and_report(place: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"""
folder: {tmp_path / "out"}
stages:
  - verb: eval
    recipe: loss
    with: {{model: {place / "zoo"}, data: {{path: {place / "texts"}}}, length: 64, "loss.trailing": 16,
      choices: {{setting: moba, layers: [0]}}, dest: "{{folder}}/loss.json"}}
  - verb: bench
    recipe: prefill
    with: {{model: {place / "zoo"}, lengths: [16, 32], rounds: 1, dest: "{{folder}}/prefill.json"}}
  - verb: generate
    recipe: sample
    with: {{model: {place / "zoo"}, prompt: "a <b>", max_new_tokens: 4, dest: "{{folder}}/text.json"}}
  - {{verb: report, recipe: "{{folder}}"}}
""")
    first = call("run", recipe)
    assert first.exit_code == 0, first.output
    lines = first.stdout.splitlines()
    assert lines[-1].split("\t")[-1] == f"wrote {tmp_path / 'out' / 'report.html'}: open it in a browser"
    assert any(line.startswith("loss, loss\tmoba\t") for line in lines)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "a &lt;b&gt;" in text
    page = unescape(text)
    assert f"mobazoo bench prefill model={place / 'zoo'} 'lengths=[16, 32]' rounds=1" in page
    said = json.loads((tmp_path / "out" / "text.json").read_text())["generate"]
    assert (said["prompt"], said["new_tokens"]) == ("a <b>", 4)
    assert said["text"] in first.stdout
    again = call("run", recipe)
    assert again.stdout.count("\tskipped\t") == 4


def test_generate_as_a_stage_needs_its_prompt(tmp_path: Path) -> None:
    text = f"folder: {tmp_path}\nstages:\n  - {{verb: generate, recipe: sample, with: {{model: m}}}}\n"
    (tmp_path / "run.yaml").write_text(text)
    result = call("run", tmp_path / "run.yaml")
    assert result.exit_code == 2
    assert "prompt: missing; as a stage of a run it stands in the recipe" in result.stderr


@pytest.mark.parametrize(
    ("said", "command"),
    [
        ({"model": "./a-b/c", "n": 3}, "mobazoo eval loss model=./a-b/c n=3"),
        ({"p": "two words"}, "mobazoo eval loss 'p=\"two words\"'"),
        ({"p": "true"}, "mobazoo eval loss 'p=\"true\"'"),
        ({"p": "1e3"}, "mobazoo eval loss 'p=\"1e3\"'"),
        ({"a": [{"layers": ":"}]}, 'mobazoo eval loss \'a=[{"layers": ":"}]\''),
    ],
)
def test_a_stage_as_a_command(said: dict[str, object], command: str) -> None:
    (step,) = RunRecipe("x", [{"verb": "eval", "recipe": "loss", "with": said}]).steps()
    assert step.command() == command


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["eval", "loss", "model=m"],
            "data.path: missing; give it in the recipe or on the command line as data.path=...",
        ),
        (["eval", "los"], "recipe 'los': no such file, and none of that name is shipped; did you mean"),
        (["eval", "loss", "model=m", "data.path=x", "settings.a=[{topk: 3}]"], "unknown key 'topk'"),
        (["bench", "prefill", "model=m", "rounds=0"], "bench.rounds: want a number >= 1, got 0"),
        (["bench", "prefill", "model=m", "round=1"], "unknown key 'round'; did you mean 'rounds'?"),
        (["report", "nothing"], "nothing: no such folder; want that of a run"),
        (["report", "nothing", "titel=x"], "unknown key 'titel'; did you mean 'title'?"),
    ],
)
def test_errors_are_one_line(args: list[str], message: str) -> None:
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in shipped(RECIPES) if name.split("/")[0] in ("eval", "bench")])
def test_shipped_measurements_dry_run(name: str) -> None:
    text = shipped(RECIPES)[name].text
    given = [f"{key}=m" for key in ("model", "data.path") if f"\n{key.split('.')[0]}:" in text]
    result = call(name.split("/")[0], name, *given, "--dry-run")
    assert result.exit_code == 0, result.output


def test_a_result_never_replaces_another_file(place: Path, tmp_path: Path) -> None:
    config = place / "zoo" / "config.json"
    before = config.read_bytes()
    for words in (
        ("eval", "loss", f"model={place / 'zoo'}", f"data.path={place / 'texts'}", "length=64", "loss.trailing=8"),
        ("bench", "prefill", f"model={place / 'zoo'}", "lengths=[16]", "rounds=1"),
        ("generate", place / "zoo", "--prompt", "a", "max_new_tokens=1"),
    ):
        result = call(*words, f"dest={config}")
        assert result.exit_code == 2, result.output
        assert "config.json: exists and is no earlier result, so it is not replaced; choose another" in result.stderr
        assert config.read_bytes() == before
        assert call(*words, f"dest={tmp_path / 'own.json'}").exit_code == 0  # an earlier result may go


def test_bench_says_where_it_cannot_write(tmp_path: Path) -> None:
    """Before it times anything, whatever writes the result."""
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "a.json"
    for words in (
        ("bench", "--length", 64, "--block-size", 8, "--rounds", 1, "--json", inside),
        ("bench", "--length", 64, "--block-size", 8, "--rounds", 1, "--markdown", inside),
        ("bench", "prefill", "model=m", f"dest={inside}"),
        ("eval", "loss", "model=m", "data.path=stdlib", f"dest={inside}"),
    ):
        result = call(*words)
        assert result.exit_code == 2
        why = f"{tmp_path / 'file'} is no folder that takes files; give another dest"
        assert result.stderr == f"error: {inside}: cannot be written: {why}\n"
        assert result.stdout == ""
    folder = call("bench", "prefill", "model=m", f"dest={tmp_path}")
    assert folder.stderr == f"error: {tmp_path}: is a folder; give the file to write\n"


def test_a_run_that_is_done_can_be_dry_run(place: Path, tmp_path: Path) -> None:
    stage = f"{{verb: convert, recipe: moba-64x3, with: {{source: {place / 'plain'}, dest: '{{folder}}/moba'}}}}"
    (tmp_path / "run.yaml").write_text(f"folder: {tmp_path / 'out'}\nstages:\n  - {stage}\n")
    assert call("run", tmp_path / "run.yaml").exit_code == 0
    done = call("run", tmp_path / "run.yaml", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "(done, would be skipped)" in done.stdout
    again = call("run", tmp_path / "run.yaml", "stages[0].with.verify=false", "--dry-run")
    assert again.exit_code == 0, again.output
    assert "(again: " in again.stdout


def test_a_dry_run_of_tokenizer_checks_its_place(place: Path) -> None:
    result = call("tokenizer", "stdlib", f"dest={place / 'zoo'}", "--dry-run")
    assert result.exit_code == 2
    assert "exists; pass overwrite=true" in result.stderr
