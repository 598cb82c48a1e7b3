"""``mobazoo train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from io import StringIO
from typing import TYPE_CHECKING

from mobazoo.cli.output import count, note, progress
from mobazoo.cli.work import DryRun, Outcome, Overrides, RecipeArgument, is_here, not_here, work
from mobazoo.config.models import model_names
from mobazoo.config.recipe import load_recipe
from mobazoo.config.train import TrainRecipe

if TYPE_CHECKING:
    from mobazoo.train import TrainPlan, TrainReport

PLACE = ("2 Work", 3)
EXAMPLES = """Example: mobazoo train tiny-moba tokenizer=./tokenizer dest=./tiny --dry-run

Example: mobazoo train tiny-moba model=./tiny dest=./tiny-full 'attention=[{pattern: full}]'"""


def main(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Train a model, from random weights or from a checkpoint, and write a checkpoint.

    Documents are packed into rows and never see each other. On several GPUs: torchrun -m mobazoo train ...
    """
    other = os.environ.get("RANK", "0") != "0"
    with redirect_stdout(StringIO()) if other else nullcontext():  # of several processes the first one speaks
        work(sys.modules[__name__], recipe, overrides, dry_run)


def resolve(recipe: str, overrides: Sequence[str]) -> TrainRecipe:
    """The recipe, from recipes/train if it is only named."""
    resolved = load_recipe(recipe, overrides, TrainRecipe, folder="train")
    resolved.check()
    resolved.require()
    return resolved


def plan(recipe: TrainRecipe) -> list[str]:
    """What would happen; model and tokenizer are checked, the documents are not read."""
    named = [name for name in (recipe.model, recipe.tokenizer) if name is not None and name not in model_names()]
    absent = [name for name in named if not is_here(name)]
    if absent:
        lines = [f"would need {not_here(name)}" for name in absent]
    else:
        found: TrainPlan = import_module("mobazoo.train").plan_train(recipe)
        start = "random weights" if found.random else "its weights"
        lines = [f"would train {recipe.model} ({count(found.parameters)} parameters) from {start}"]
    rows = recipe.total_steps * recipe.batch
    return [
        *lines,
        f"would do {recipe.total_steps} steps of {recipe.batch} rows of {recipe.length}: {rows} rows, "
        f"{count(rows * recipe.length)} tokens",
        f"would read {recipe.data.path} ({recipe.data.split} documents)",
        f"would write {recipe.dest}",
    ]


def execute(recipe: TrainRecipe) -> Outcome:
    """Trains, with a bar on a terminal."""
    with progress() as update:
        report: TrainReport = import_module("mobazoo.train").train(recipe, update, note)
    held_out = "" if report.validation is None else f", validation {report.validation.loss:.4f}"
    return Outcome(
        f"wrote {recipe.dest}: {report.steps} steps, {count(report.tokens)} tokens, loss {report.loss:.4f}{held_out}",
        [recipe.dest],
    )
