"""Every command that a document, a recipe or a verb's help shows is one: it parses, and so does what it resolves."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mobazoo.cli import app
from mobazoo.cli.assemble import discover
from mobazoo.config.shipped import find

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").rglob("*.yaml"))]
RECIPES = [block for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)]


def shown() -> Iterator[str]:
    """From blocks of code, first comments and examples, without what a shell does around them."""
    texts = [
        "\n".join(re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL) or [page.read_text()]) for page in PAGES
    ]
    texts += [verb.EXAMPLES for verb in discover().values()]
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        plain = line.strip().removeprefix("# ").removeprefix("Example: ").replace(" < book.txt", "")
        for command in re.split(r" && | \| ", plain):
            if command.startswith("mobazoo ") and "..." not in command:
                yield command


@pytest.mark.parametrize("command", sorted(set(shown())))
def test_command(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, *words = shlex.split(command, comments=True)[1:]
    for word in words:
        if word.endswith(".yaml") and name != "copy":  # one of the page itself, or a copy of a shipped one
            shipped = find("quickstart" if name == "run" else "moba-4096x12").text
            (tmp_path / word).write_text(next((recipe for recipe in RECIPES if command in recipe), shipped))
        elif ".include=" in word:  # a folder of the user's
            (tmp_path / word.partition("=")[2]).mkdir()
    files = list(tmp_path.iterdir())
    group = typer.main.get_command(app)
    verb = group.commands[name]  # type: ignore[attr-defined]
    context = verb.make_context(name, list(words))
    if name == "copy" or ("dry_run" not in context.params and name != "bench"):
        return
    done = CliRunner().invoke(app, [name, *(word for word in words if word != "--dry-run"), "--dry-run"], input="x")
    assert done.exit_code == 0, done.output
    assert list(tmp_path.iterdir()) == files
