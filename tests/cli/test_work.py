"""convert, run, generate, bench: dry runs touch nothing, work is done once, errors say where."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mobazoo.cli import app
from mobazoo.cli.stages import Planned, planned
from mobazoo.cli.work import Outcome
from mobazoo.config.recipe import load_recipe
from mobazoo.config.run import RunRecipe
from mobazoo.config.shipped import RECIPES, shipped
from mobazoo.errors import InputError
from tests.small import plain_checkpoint

RULES = "attention=[{pattern: moba, block_size: 8, top_k: 3}]"


def call(*args: object, text: str | None = None) -> Result:
    return CliRunner().invoke(app, list(map(str, args)), input=text)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.mark.parametrize("name", [name for name in shipped(RECIPES) if name.startswith("convert/")])
def test_shipped_conversions_dry_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("convert", name, "source=org/model", "dest=there", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "# would write there" in result.stdout
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "again.yaml").write_text(result.stdout)  # what it prints is the recipe
    assert call("convert", "again.yaml", "--dry-run").stdout == result.stdout


def test_convert_and_show(checkpoint: Path, tmp_path: Path) -> None:
    args = ("convert", "moba-512x3", f"source={checkpoint}", f"dest={tmp_path / 'zoo'}", RULES)
    dry = call(*args, "--dry-run")
    assert "# would link or copy 1 weight files and write 0" in dry.stdout
    assert list(tmp_path.iterdir()) == []
    done = call(*args)
    assert done.exit_code == 0, done.output
    assert "verified: logits within" in done.stdout
    assert "with MoBA on 24 tokens" in done.stdout
    again = call(*args)
    assert again.exit_code == 2
    assert "exists" in again.stderr
    shown = call("show", tmp_path / "zoo", "attention=[{layers: 0, top_k: 2}]", "--device", "cpu").stdout
    assert "0\t1\tmoba\t8\t2\tfull" in shown
    assert "1\t1\tmoba\t8\t3\tfull" in shown
    wrong = call("show", tmp_path / "zoo", "attention=[{topk: 2}]")
    assert "did you mean 'top_k'?" in wrong.stderr
    plain = call("show", checkpoint, "--device", "cpu").stdout
    assert "0-1\t2\tfull\t\t\tfull" in plain


def test_generate_from_argument_file_and_stdin(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Once upon")
    common = ("generate", checkpoint, "temperature=0", "max_new_tokens=4", "device=cpu")
    found = [
        call(*common, "--prompt", "Once upon"),
        call(*common, "--prompt-file", tmp_path / "prompt.txt"),
        call(*common, text="Once upon"),
    ]
    assert [result.exit_code for result in found] == [0, 0, 0], found[0].output
    assert len({result.stdout for result in found}) == 1
    assert len(found[0].stdout.rstrip("\n")) >= 1
    said = found[0].stderr.splitlines()[-2:]
    assert re.fullmatch(r"9 tokens read in [\d.]+ s \([\d.]+/s\), 4 written \([\d.]+/s\)", said[0]), said
    # All layers are full: the three tokens that are read again see 10, 11 and 12 keys.
    assert re.fullmatch(r"11 keys read per token and head, mean over layers; peak memory [\d.]+ [MG]iB", said[1]), said


def test_generate_by_chunks_from_mapped_files_sparsely(checkpoint: Path, tmp_path: Path) -> None:
    rules = "attention=[{pattern: moba, block_size: 4, top_k: 2}]"
    common = ("generate", checkpoint, "temperature=0", "max_new_tokens=5", "device=cpu", rules)
    text = "Once upon a time there was"
    found = [
        call(*common, "decode=moba", text=text),
        call(*common, "decode=moba", "prefill_chunk=7", f"offload={tmp_path}", text=text),
        call(*common, text=text),
    ]
    assert [result.exit_code for result in found] == [0, 0, 0], found[1].output
    assert found[0].stdout == found[1].stdout
    # The tokens at 26 to 29 read 4 keys of an earlier block and 3, 4, 1 and 2 of their own.
    assert ["6 keys" in result.stderr for result in found] == [True, True, False]
    assert "28 keys" in found[2].stderr
    plan = call(*common, "prefill_chunk=7", "offload=host", "--dry-run").stdout
    assert "# would read the prompt 7 tokens at a time" in plan
    assert "# would keep keys and values in host memory" in plan


@pytest.mark.parametrize(
    ("args", "text", "message"),
    [
        (["--prompt", "a", "--prompt-file", "b"], None, "--prompt and --prompt-file: want one of them, got both"),
        (["--prompt-file", "nothing.txt"], None, "prompt nothing.txt: cannot be read as text"),
        ([], "", "prompt: is empty; give --prompt, --prompt-file, or text on stdin"),
        (["max_new_tokens=200", "--prompt", "a"], None, "max_new_tokens=200: the model has 128 positions"),
        (["chat=true", "--prompt", "a"], None, "the tokenizer has no chat template"),
        (["prefill_chunk=0", "--prompt", "a"], None, "prefill_chunk: want at least 1 token, got 0"),
        (["decode=sparse", "--prompt", "a"], None, "decode: want full or moba, got 'sparse'"),
        (
            ["offload=/no/where", "--prompt", "a", "max_new_tokens=1"],
            None,
            "offload: want 'host' or a folder for mapped files",
        ),
        (["max_new_tokens=0"], "a", "max_new_tokens: want at least 1, got 0"),
        (["temperature=-1"], "a", "temperature: want 0 (greedy) or more, got -1"),
        ([f"seed={2**64}"], "a", f"seed: want a number of 64 bits, got {2**64}"),
        (["system=b"], "a", "system: stands in a chat template, and the tokenizer has none; leave it out, or put it"),
        (["top_p=0"], "a", "top_p: want a share above 0 and up to 1, got 0"),
        (["temperature=0", "top_p=0.9"], "a", "top_p: temperature=0 is greedy and samples nothing, got 0.9; leave one"),
        (["max_tokens=3"], "a", "unknown key 'max_tokens'; did you mean 'max_new_tokens'?"),
    ],
)
def test_generate_errors(args: list[str], text: str | None, message: str, checkpoint: Path) -> None:
    result = call("generate", checkpoint, *args, text=text)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_generate_dry_run_loads_nothing() -> None:
    result = call("generate", "org/model", "seed=1", "--dry-run")
    assert "model: org/model" in result.stdout
    assert "# would load org/model (no folder here now" in result.stdout
    assert "# would write up to 256 tokens after the prompt" in result.stdout


def test_bench_hands_its_arguments_over() -> None:
    assert (
        "would time forward, 16384 tokens, block 128, top 8"
        in call("bench", "--dry-run", "--length", 16384, "--block-size", 128, "--top-k", 8).stdout
    )
    assert "mobazoo bench --length" in " ".join(call("bench", "--help").stdout.split())
    wrong = call("bench", "--suite", "gpu", "--length", 64)
    assert wrong.exit_code == 2
    assert wrong.stderr == "error: bench: unknown suite 'gpu'; known: cpu, decode\n"
    unknown = call("bench", "--no-such-thing")
    assert unknown.exit_code == 2
    assert unknown.stderr == "error: No such option: --no-such-thing; `mobazoo bench --help` says what there is\n"
    both = call("bench", "--suite", "cpu", "--top-k", 2, "--length", 64, "--dry-run")
    assert both.exit_code == 2
    assert both.stderr == "error: bench: --suite cpu has cases of its own; leave out --length, --top-k\n"


class Writer(ModuleType):
    """A stage that writes its number into a file."""

    def __init__(self) -> None:
        super().__init__("write")
        self.calls: list[str] = []

    def resolve(self, recipe: str, overrides: Sequence[str]) -> Any:
        return dict(override.split("=", 1) for override in overrides)

    def plan(self, recipe: Any) -> list[str]:
        return [f"would write {recipe['dest']}"]

    def execute(self, recipe: Any) -> Outcome:
        dest = Path(json.loads(recipe["dest"])).expanduser()
        if dest.exists():
            raise InputError(f"{dest}: exists")
        dest.write_text(recipe["number"])
        self.calls.append(recipe["number"])
        return Outcome(f"wrote {dest.name}", [json.loads(recipe["dest"])])


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recipe of two stages and what runs them."""
    verb = Writer()
    monkeypatch.setattr("mobazoo.cli.assemble.discover", lambda: {"write": verb, "show": ModuleType("show")})
    text = "folder: {}\nstages:\n"
    for name in "ab":
        text += f"  - {{{{verb: write, recipe: x, with: {{{{dest: '{{{{folder}}}}/{name}', number: 1}}}}}}}}\n"
    recipe, folder = tmp_path / "run.yaml", tmp_path / "out"
    recipe.write_text(text.format(folder))
    folder.mkdir()
    return SimpleNamespace(verb=verb, recipe=recipe, folder=folder, run=lambda *args: call("run", recipe, *args))


def test_run_does_each_stage_once(stages: Any) -> None:
    first = stages.run()
    assert first.exit_code == 0, first.output
    assert [row.split("\t")[4] for row in first.stdout.splitlines()] == ["result", "wrote a", "wrote b"]
    assert stages.verb.calls == ["1", "1"]
    second = stages.run()
    assert [row.split("\t")[3] for row in second.stdout.splitlines()] == ["seconds", "skipped", "skipped"]
    assert stages.verb.calls == ["1", "1"]


def test_run_dry_run_touches_nothing(stages: Any) -> None:
    result = stages.run("--dry-run")
    assert f'#   would write "{stages.folder}/a"' in result.stdout
    assert list(stages.folder.iterdir()) == []
    stages.run()
    assert result.stdout.count("done, would be skipped") == 0
    assert stages.run("--dry-run").stdout.count("done, would be skipped") == 2


def test_a_changed_stage_runs_again_and_so_does_what_follows(stages: Any) -> None:
    stages.run()
    assert stages.run("stages[1].with.number=2").exit_code == 0
    assert stages.verb.calls == ["1", "1", "2"]
    assert stages.run("stages[0].with.number=3", "stages[1].with.number=2").exit_code == 0
    assert stages.verb.calls[3:] == ["3", "2"]
    assert (stages.folder / "a").read_text() == "3"


def test_a_folder_below_home(stages: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for number in (1, 1, 2):
        result = stages.run("folder=~/out", f"stages[1].with.number={number}")
        assert result.exit_code == 0, result.output
    assert stages.verb.calls == ["1", "1", "2"]
    assert (stages.folder / ".stages" / "01-write.json").is_file()


def test_what_a_killed_run_left_beside_its_result_goes(stages: Any) -> None:
    step = RunRecipe("x", [{"verb": "train", "recipe": "y"}]).steps()[0]
    stamp = stages.folder / ".stages" / "01-train.json"
    for name in ("a", "a.training", ".a.mobazoo-new", ".a.parts", "b.training"):
        (stages.folder / name).mkdir()
    Planned(step, stages.verb, {}, "digest", stamp).skip(Outcome("wrote a", [str(stages.folder / "a")]))
    assert {path.name for path in stages.folder.iterdir()} == {".stages", "a", ".a.parts", "b.training"}
    assert json.loads(stamp.read_text())["seconds"] is None


def test_a_stage_whose_output_has_gone_runs_again(stages: Any) -> None:
    stages.run()
    (stages.folder / "b").unlink()
    stages.run()
    assert stages.verb.calls == ["1", "1", "1"]


def test_what_a_stage_finds_there_and_did_not_write_is_not_removed(stages: Any) -> None:
    (stages.folder / "a").write_text("mine")
    result = stages.run()
    assert result.exit_code == 2
    assert (stages.folder / "a").read_text() == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages[0].verb=show", "stage 1: 'show' is no stage; want one of write"),
        ("stages[0].vreb=x", "stages[0]: unknown key 'vreb'; did you mean 'verb'?"),
        ("stages[1].recipe=3", "stages[1].recipe: want text, got 3"),
        ("stages[1].with=3", "stages[1].with: want a mapping, got 3"),
        ("stages=[]", "stages: none; want a list like"),
        ("folder=", "folder: is empty; want the run's folder, folder=runs/mine"),
    ],
)
def test_run_errors_come_before_anything_runs(override: str, message: str, stages: Any) -> None:
    result = stages.run(override)
    assert result.exit_code == 2
    assert message in result.stderr
    assert stages.verb.calls == []


def test_a_bad_recipe_of_a_later_stage_names_the_stage(tmp_path: Path) -> None:
    text = f"folder: {tmp_path}\nstages:\n  - {{verb: convert, recipe: to-hf, with: {{sorce: a}}}}\n"
    (tmp_path / "run.yaml").write_text(text)
    result = call("run", tmp_path / "run.yaml")
    assert "stage 1 (convert): override 'sorce=\"a\"': unknown key 'sorce'; did you mean 'source'?" in result.stderr


def test_a_stamp_that_is_none_says_so(stages: Any) -> None:
    stages.run()
    (stages.folder / ".stages" / "01-write.json").write_text("{")
    assert "not a stamp (" in stages.run().stderr
    (stages.folder / ".stages" / "01-write.json").write_text("{}")
    assert "not a stamp of this version" in stages.run().stderr


def test_planned_stages_place_the_folder(stages: Any) -> None:
    recipe = load_recipe(stages.recipe, [], RunRecipe)
    first, second = planned(recipe, {"write": stages.verb})
    assert first.recipe["dest"] == json.dumps(str(stages.folder / "a"))
    assert first.digest != second.digest
