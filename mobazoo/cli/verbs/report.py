"""``mobazoo report``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from mobazoo.cli.output import say, table
from mobazoo.cli.work import DryRun, Outcome, Overrides, show_plan
from mobazoo.config.recipe import parse_recipe
from mobazoo.config.report import ReportRecipe
from mobazoo.config.shipped import Source, find
from mobazoo.files import check_place
from mobazoo.report.html import is_page

PLACE = ("3 Measure", 3)
EXAMPLES = "Example: mobazoo report runs/quickstart"


def main(
    run: Annotated[str, typer.Argument(metavar="RUN_FOLDER", help="Of `mobazoo run`, or any with JSON results.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Write one HTML page about a run: tables and plots, nothing outside it needed; and the plots as PNG."""
    recipe = resolve(run, overrides or [])
    if dry_run:
        show_plan(recipe, plan(recipe))
    else:
        say(execute(recipe).line)


def resolve(recipe: str, overrides: Sequence[str]) -> ReportRecipe:
    """A recipe by its file, or one that says no more than the run's folder."""
    said = f"run: {json.dumps(recipe)}"
    source = find(recipe) if Path(recipe).is_file() else Source(recipe, recipe, said)
    resolved = parse_recipe(source, overrides, ReportRecipe)
    resolved.require()
    check_place(resolved.page(), is_page)
    return resolved


def plan(recipe: ReportRecipe) -> list[str]:
    """What would happen."""
    page = recipe.page()
    lines = [f"would read {recipe.run}", f"would write {page}"]
    return [*lines, f"would write pictures into {page.parent / page.stem}-pictures"] if recipe.pictures else lines


def execute(recipe: ReportRecipe) -> Outcome:
    """Writes the page and prints its short table."""
    (path, *pictures), (header, rows) = import_module("mobazoo.report.page").write_report(recipe)
    table("In short", header, rows)
    for folder in pictures:
        say(f"wrote the plots as PNG into {folder}")
    return Outcome(f"wrote {path}: open it in a browser", [str(path), *map(str, pictures)])
