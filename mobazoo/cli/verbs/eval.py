"""``mobazoo eval``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from mobazoo.cli.output import progress, table
from mobazoo.cli.work import DryRun, Outcome, Overrides, RecipeArgument, work, would_load
from mobazoo.config.eval import EvalRecipe
from mobazoo.config.recipe import load_recipe
from mobazoo.files import check_result_place

PLACE = ("3 Measure", 1)
EXAMPLES = """Example: mobazoo eval loss model=./Qwen3-0.6B-moba data.path=./texts

Example: mobazoo eval loss model=./Qwen3-0.6B-moba data.path=stdlib length=8192 'settings.wide=[{top_k: 8}]'"""


def main(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Measure a checkpoint on texts under several attention settings: loss by position, which blocks are read."""
    work(sys.modules[__name__], recipe, overrides, dry_run)


def resolve(recipe: str, overrides: Sequence[str]) -> EvalRecipe:
    """The recipe, from recipes/eval if it is only named."""
    resolved = load_recipe(recipe, overrides, EvalRecipe, folder="eval")
    resolved.check()
    check_result_place(resolved.dest)
    resolved.data.require()
    return resolved


def plan(recipe: EvalRecipe) -> list[str]:
    """What would happen. A folder that is here is checked with every setting; the texts are not read."""
    texts = f"up to {recipe.documents} texts of {recipe.length} tokens from {recipe.data.path}"
    load = would_load(recipe.model, list(recipe.named_settings().values()), recipe.device, recipe.dtype)
    lines = [f"would read {texts}", load]
    lines.append(f"would compare the settings {', '.join(recipe.named_settings())}")
    return [*lines, f"would write {recipe.dest}"] if recipe.dest else lines


def execute(recipe: EvalRecipe) -> Outcome:
    """Measures, with a bar on a terminal, and prints the table."""
    import_module("mobazoo.zoo").register()  # for the tokenizer, which asks for the model's config
    with progress() as update:
        found = import_module("mobazoo.eval.evaluate").evaluate(recipe, update)
    texts = f"{found['texts']['count']} texts of {found['texts']['length']} tokens"
    line = texts
    if "loss" in found:
        header, rows = loss_rows(found["loss"])
        table(f"Loss in nats, {texts}; difference to the first setting text by text", header, rows)
        line += ", loss " + ", ".join(f"{row[0]} {row[1]}" for row in rows)
    return Outcome(line, [recipe.dest] if recipe.dest else [])


def loss_rows(loss: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table, a row for each setting."""
    trailing = f"last {loss['trailing_tokens']}"
    header = ("setting", "mean loss", "±", trailing, "±", "difference", "±", f"{trailing}: difference", "±", "keys")
    rows = []
    for name, said in loss["settings"].items():
        cells: list[str] = []
        for what, digits in (("mean", 3), ("trailing", 3), ("difference", 4), ("trailing_difference", 4)):
            error = said[what]["error"]
            cells += [f"{said[what]['mean']:.{digits}f}", "" if error is None else f"{error:.{digits}f}"]
        rows.append((name, *cells, f"{100 * said['share_read']:.3g} %"))
    return header, rows
