"""``mobazoo run``."""

from __future__ import annotations

import typer

from mobazoo.cli.output import note, table
from mobazoo.cli.stages import planned
from mobazoo.cli.work import DryRun, Overrides, RecipeArgument, show_plan
from mobazoo.config.recipe import load_recipe
from mobazoo.config.run import RunRecipe
from mobazoo.files import read_stamp

PLACE = ("2 Work", 9)
EXAMPLES = "Example: mobazoo run mine.yaml folder=runs/mine --dry-run"


def main(context: typer.Context, recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Run the stages of a recipe in order; what is done already is skipped.

    A stage counts as done while its recipe, the stages before it and what it wrote are as they were.
    """
    resolved = load_recipe(recipe, overrides or [], RunRecipe)
    stages = planned(resolved, context.obj)
    names = [f"stage {i} of {len(stages)}: {stage.step.verb} {stage.step.recipe}" for i, stage in enumerate(stages, 1)]
    if dry_run:
        lines = []
        for name, stage in zip(names, stages, strict=True):
            if stage.done() is not None:
                lines.append(f"{name} (done, would be skipped)")
            elif read_stamp(stage.stamp) is not None:  # its places are not free yet
                lines.append(f"{name} (again: its recipe, a stage before it or what it wrote has changed)")
            else:
                lines += [name, *(f"  {line}" for line in stage.verb.plan(stage.recipe))]
        show_plan(resolved, lines)
        return
    rows = []
    for i, (name, stage) in enumerate(zip(names, stages, strict=True), 1):
        outcome, took = stage.done(), "skipped"
        if outcome is not None:
            stage.skip(outcome)
        else:
            note(name)
            outcome, seconds = stage.run()
            took = f"{seconds:.1f}"
        rows.append((i, stage.step.verb, stage.step.recipe, took, outcome.line))
    table("Stages", ("stage", "verb", "recipe", "seconds", "result"), rows)
