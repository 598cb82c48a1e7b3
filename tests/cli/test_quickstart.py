"""`make demo` at reduced size: every stage of recipes/quickstart.yaml, a second run that skips them, a changed one."""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from mobazoo.cli import app
from mobazoo.config.recipe import load_recipe
from mobazoo.config.run import RunRecipe

ROOT = Path(__file__).parents[2]
VERBS = ["tokenizer", "train", "convert", "convert", "eval", "train", "eval", "generate", "bench", "report"]
# A few files of the standard library, rows of 128 tokens, blocks of 16, three steps.
FEW = "{{path: stdlib, files: ['json/*.py', 'email/*.py'], split: {}, validation: 0.3, min_chars: 1000}}"
SMALLER = [
    f"stages[0].with.data={FEW.format('train')}",
    "stages[0].with.vocab=400",
    "stages[1].with.config={vocab_size: 400, hidden_size: 64, num_hidden_layers: 3, max_position_embeddings: 512}",
    *(f"stages[{i}].with.{said}" for i in (1, 5) for said in ("length=128", "batch=2", "tokens=768")),
    *(f"stages[{i}].with.data={FEW.format('train')}" for i in (1, 5)),
    "stages[3].with.attention=[{pattern: moba, block_size: 16, top_k: 3}]",
    *(f"stages[{i}].with.data={FEW.format('validation')}" for i in (4, 6)),
    *(f"stages[{i}].with.{said}" for i in (4, 6) for said in ("length=128", "loss={trailing: 32}", "documents=4")),
    "stages[7].with.max_new_tokens=8",
    "stages[8].with.lengths=[64, 256]",
    "stages[8].with.rounds=1",
]


def run(folder: Path, *args: str) -> Result:
    command = ["run", str(ROOT / "recipes" / "quickstart.yaml"), f"folder={folder}", *SMALLER, *args]
    return CliRunner().invoke(app, command)


def stage_rows(result: Result) -> list[list[str]]:
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    return rows[rows.index(["stage", "verb", "recipe", "seconds", "result"]) + 1 :]


def test_the_demo_is_this_recipe() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo: .*\n\t\$\(PY\) -m mobazoo run recipes/quickstart\.yaml$", makefile, re.MULTILINE)
    steps = load_recipe("quickstart", [], RunRecipe).steps()
    assert [step.verb for step in steps] == VERBS


def test_the_demo_at_reduced_size(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    dry = run(folder, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert not folder.exists()
    first = run(folder)
    assert first.exit_code == 0, first.output + first.stderr
    rows = stage_rows(first)
    assert [row[1] for row in rows] == VERBS
    assert rows[-1][4] == f"wrote {folder / 'report.html'}: open it in a browser"
    assert "verified: logits within" in rows[3][4]
    assert "with MoBA on 48 tokens" in rows[3][4]
    # The checkpoint in the middle is an ordinary one, and both measurements compare the same settings.
    assert json.loads((folder / "plain" / "config.json").read_text())["model_type"] == "llama"
    assert AutoModelForCausalLM.from_pretrained(folder / "plain").config.model_type == "llama"
    before, after = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "after"))
    for said in (before, after):
        full, moba = said["loss"]["settings"]["full"], said["loss"]["settings"]["moba"]
        assert moba["share_read"] < full["share_read"] == 1
        assert moba["mean"]["mean"] != full["mean"]["mean"]
    assert after["loss"]["settings"]["moba"] != before["loss"]["settings"]["moba"]
    page = (folder / "report.html").read_text()
    for words in ("Loss by position", "Time to read a prompt", "Blocks that layer 2 reads", "class Reader:"):
        assert words in page
    assert str(folder) in page  # the commands, as they would be typed
    written = (folder / "report.html").stat().st_mtime_ns
    assert [row[3] for row in stage_rows(run(folder))] == ["skipped"] * 10
    assert (folder / "report.html").stat().st_mtime_ns == written
    again = stage_rows(run(folder, "stages[8].with.lengths=[64, 128]"))
    assert [row[3] == "skipped" for row in again] == [True] * 8 + [False] * 2
