"""``mobazoo explain``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mobazoo.cli.output import note, say, table
from mobazoo.cli.work import DryRun, Overrides, show_plan
from mobazoo.config.explain import ExplainRecipe
from mobazoo.config.recipe import has_key, parse_recipe
from mobazoo.config.shipped import Source, find

if TYPE_CHECKING:
    from mobazoo.cli.costs import Explained

PLACE = ("1 Look", 4)
EXAMPLES = """Example: mobazoo explain llama3.2-1b length=16384 'attention=[{pattern: moba, block_size: 512, top_k: 3}]'

Example: mobazoo explain ./Qwen3-0.6B-moba measure=true"""


def main(
    model: Annotated[str, typer.Argument(metavar="NAME|FOLDER", help="From `mobazoo models`, a folder or a Hub id.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Say what attention costs at a length, full and by the rules: FLOPs, bytes, cache, time, and from where it pays.

    Times are of attention alone, on random inputs, on this machine: predicted from short runs, with measure=true timed.
    """
    recipe = resolve(model, overrides or [])
    if dry_run:
        tokens = "4096 tokens, or of twice what its blocks cover where that is more"
        show_plan(recipe, [f"would read the configuration of {recipe.model} and time attention of {tokens}"])
        return
    costs = import_module("mobazoo.cli.costs")
    found: Explained = costs.explain(recipe)
    table(f"{recipe.model}, a prefill of {recipe.length} tokens in {recipe.dtype}", costs.HEADER, found.rows)
    for remark in found.remarks:
        say(remark)
    if found.warning:
        note(f"warning: {found.warning}")


def resolve(model: str, overrides: Sequence[str]) -> ExplainRecipe:
    """A recipe of ``mobazoo explain`` by its file, or one that says no more than the model."""
    source = find(model) if Path(model).is_file() else None
    if source is None or not has_key(source, "model"):  # a model file has no such key
        source = Source(model, model, f"model: {json.dumps(model)}")
    recipe = parse_recipe(source, overrides, ExplainRecipe)
    recipe.check()
    return recipe
