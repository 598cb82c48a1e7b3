"""``mobazoo convert``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from mobazoo.cli.output import progress
from mobazoo.cli.work import DryRun, Outcome, Overrides, RecipeArgument, work
from mobazoo.config.convert import ConvertRecipe
from mobazoo.config.recipe import load_recipe

PLACE = ("2 Work", 1)
EXAMPLES = """Example: mobazoo convert moba-4096x12 source=./Llama-3.1-8B dest=./Llama-3.1-8B-moba

Example: mobazoo convert moba-512x3 source=./Qwen3-0.6B dest=./out attention[0].top_k=4 --dry-run"""


def main(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Give the layers of a checkpoint other attention, without moving a weight, and prove the result.

    Reads a Hugging Face folder (or Hub id) of Llama or Qwen, writes one of the zoo, or back.
    """
    work(sys.modules[__name__], recipe, overrides, dry_run)


def resolve(recipe: str, overrides: Sequence[str]) -> ConvertRecipe:
    """The recipe, from recipes/convert if it is only named."""
    resolved = load_recipe(recipe, overrides, ConvertRecipe, folder="convert")
    resolved.check()
    return resolved


def plan(recipe: ConvertRecipe) -> list[str]:
    """What would happen."""
    here = Path(recipe.source).expanduser().is_dir()
    there = Path(recipe.dest).expanduser().exists()
    taken = "is there and would be replaced" if recipe.overwrite else "is there already, so this would be refused"
    return [
        f"would read {recipe.source}{'' if here else ' (no folder here yet: looked up on the Hub)'}",
        f"would write {recipe.dest}{f', which {taken}' if there else ''}",
        "would prove the result before putting it in place" if recipe.verify else "would prove nothing (verify: false)",
    ]


def execute(recipe: ConvertRecipe) -> Outcome:
    """Converts, with a bar on a terminal."""
    with progress() as update:
        import_module("mobazoo.checkpoint.convert").convert(recipe, progress=update)
    return Outcome(f"wrote {recipe.dest}", [recipe.dest])
