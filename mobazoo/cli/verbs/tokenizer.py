"""``mobazoo tokenizer``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from mobazoo.cli.output import count, progress
from mobazoo.cli.work import DryRun, Outcome, Overrides, RecipeArgument, work
from mobazoo.config.recipe import load_recipe
from mobazoo.config.tokenizer import TokenizerRecipe

if TYPE_CHECKING:
    from mobazoo.data.bpe import TokenizerReport

PLACE = ("2 Work", 2)
EXAMPLES = "Example: mobazoo tokenizer tokenizer/stdlib dest=./tokenizer vocab=2048"


def main(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Learn a byte-level BPE tokenizer from documents.

    Writes a Hugging Face tokenizer folder, for training a model from nothing.
    """
    work(sys.modules[__name__], recipe, overrides, dry_run)


def resolve(recipe: str, overrides: Sequence[str]) -> TokenizerRecipe:
    """The recipe, from recipes/tokenizer if it is only named."""
    resolved = load_recipe(recipe, overrides, TokenizerRecipe, folder="tokenizer")
    resolved.check()
    resolved.data.require()
    return resolved


def plan(recipe: TokenizerRecipe) -> list[str]:
    """What would happen; the place is checked, the documents are not read."""
    import_module("mobazoo.checkpoint.place").free_place(recipe.dest, recipe.overwrite, "tokenizer.json")
    return [
        f"would learn {recipe.vocab} tokens from {recipe.data.path} ({recipe.data.split} documents)",
        f"would write {recipe.dest}",
    ]


def execute(recipe: TokenizerRecipe) -> Outcome:
    """Learns it, with a bar on a terminal."""
    with progress() as update:
        report: TokenizerReport = import_module("mobazoo.data.bpe").train_tokenizer(recipe, update)
    return Outcome(
        f"wrote {recipe.dest}: {report.vocab} tokens from {report.documents} documents, "
        f"{count(report.characters)} characters",
        [recipe.dest],
    )
