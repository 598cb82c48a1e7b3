"""``mobazoo probe``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from mobazoo.cli.output import progress, say, table
from mobazoo.cli.work import DryRun, Outcome, Overrides, recipe_or_model, show_plan, would_load
from mobazoo.config.probe import ProbeRecipe
from mobazoo.config.recipe import parse_recipe, to_yaml
from mobazoo.files import check_result_place
from mobazoo.probe.tables import chosen_setting, grid_rows, layer_rows

PLACE = ("3 Measure", 0)
EXAMPLES = """Example: mobazoo probe ./Llama-3.2-1B data.path=./texts length=8192 block_sizes='[256, 512]'

Example: mobazoo probe ./Qwen3-0.6B data.path=stdlib suggest.block_size=64 suggest.top_k=3 suggest.full=3"""


def main(
    model: Annotated[str, typer.Argument(metavar="RECIPE|FOLDER", help="A recipe, a checkpoint folder or a Hub id.")],
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Measure a dense checkpoint before training: what blocks would keep, layer by layer, and which to leave full."""
    recipe = resolve(model, overrides or [])
    if dry_run:
        show_plan(recipe, plan(recipe))
    else:
        say(execute(recipe).line)


def resolve(model: str, overrides: Sequence[str]) -> ProbeRecipe:
    """A recipe by path or name, or one that says no more than the model."""
    resolved = parse_recipe(recipe_or_model(model, "probe"), overrides, ProbeRecipe)
    resolved.check()
    check_result_place(resolved.dest)
    return resolved


def plan(recipe: ProbeRecipe) -> list[str]:
    """What would happen. A folder that is here is checked; the Hub is not asked, and the texts are not read."""
    texts = f"up to {recipe.documents} texts of {recipe.length} tokens from {recipe.data.path}"
    grid = ", ".join(f"{pattern.block_size} x {pattern.top_k}" for pattern in recipe.settings())
    load = would_load(recipe.model, [[]], recipe.device, recipe.dtype)
    lines = [f"would read {texts}", load, f"would look at blocks x top_k of {grid}"]
    if recipe.suggest is not None:
        lines.append("would switch one layer at a time, and check the rules that come of it")
    return [*lines, f"would write {recipe.dest}"] if recipe.dest else lines


def execute(recipe: ProbeRecipe) -> Outcome:
    """Measures, with a bar on a terminal, and prints tables and the rules."""
    import_module("mobazoo.zoo").register()  # for the tokenizer, which asks for the model's config
    with progress() as update:
        found = import_module("mobazoo.probe.run").probe(recipe, update)["probe"]
    texts = f"{found['texts']['count']} texts of {found['texts']['length']} tokens"
    table(f"Full attention that blocks would keep, {texts}", *grid_rows(found))
    say()
    chosen = chosen_setting(found)
    title = f"Layers, block {chosen['block_size']}, top {chosen['top_k']}; means over heads, loss in nats"
    table(title, *layer_rows(found, chosen))
    line, outputs = texts, [recipe.dest] if recipe.dest else []
    if "suggested" in found:
        said = found["suggested"]
        say(f"\n# {said['trust']['level']} trust: {said['trust']['why']}")
        say(to_yaml({"attention": said["rules"]}).rstrip())
        full = ", ".join(map(str, said["full"])) or "none"
        line += f", suggested: layers left full {full} ({said['trust']['level']} trust)"
    return Outcome(line, outputs)
