"""``mobazoo probe``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from mobazoo.cli.output import progress, say, table
from mobazoo.cli.work import DryRun, Outcome, Overrides, show_plan
from mobazoo.config.probe import ProbeRecipe
from mobazoo.config.recipe import parse_recipe, to_yaml
from mobazoo.config.shipped import RECIPES, Source, find, shipped

PLACE = ("3 Measure", 0)
EXAMPLES = """Example: mobazoo probe ./Llama-3.2-1B data.path=./texts length=8192 block_sizes='[256, 512]'

Example: mobazoo probe ./Qwen3-0.6B data.path=stdlib suggest.block_size=128 suggest.top_k=8 suggest.full=3"""
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


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
    is_recipe = Path(model).is_file() or model.endswith(".yaml") or f"probe/{model}" in shipped(RECIPES)
    if is_recipe or model in shipped(RECIPES):
        source = find(model, RECIPES, "probe")
    else:
        source = Source(model, model, f"model: {json.dumps(model)}")
    resolved = parse_recipe(source, overrides, ProbeRecipe)
    resolved.check()
    return resolved


def plan(recipe: ProbeRecipe) -> list[str]:
    """What would happen."""
    texts = f"up to {recipe.documents} texts of {recipe.length} tokens from {recipe.data.path}"
    grid = ", ".join(f"{pattern.block_size} x {pattern.top_k}" for pattern in recipe.settings())
    lines = [f"would read {texts}", f"would load {recipe.model}", f"would look at blocks x top_k of {grid}"]
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


def chosen_setting(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the grid that the suggestion is for, or its first."""
    grid: list[Mapping[str, Any]] = found["grid"]
    wanted = found.get("suggested", grid[0])
    return next(one for one in grid if all(one[key] == wanted[key] for key in ("block_size", "top_k")))


def grid_rows(found: Mapping[str, Any]) -> Table:
    """Header and rows of the table by setting."""
    header = ("block", "top_k", "keys read", "mass kept", "worst layer", "best blocks", "strongest key in", "tiles")
    rows = []
    for one in found["grid"]:
        mass, best, hit = (
            [_mean(layer[name]) for layer in one["layers"]] for name in ("mass", "best", "hit")
        )
        density = _mean([layer["density"] for layer in one["layers"]])
        shares = (one["share_read"], _mean(mass), min(mass), _mean(best), _mean(hit), density)
        rows.append((str(one["block_size"]), str(one["top_k"]), *(_percent(share) for share in shares)))
    return header, rows


def layer_rows(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> Table:
    """Header and rows of the table by layer, for one setting."""
    header = ("layer", "mass kept", "worst head", "best blocks", "strongest key in", "tiles", "SNR", "SNR measured")
    signal = next(one["layers"] for one in found["signal"] if one["block_size"] == chosen["block_size"])
    changes = found["suggested"]["layers"] if "suggested" in found else []
    rows = []
    for number, (layer, heard) in enumerate(zip(chosen["layers"], signal, strict=True)):
        shares = (_mean(layer["mass"]), min(layer["mass"]), _mean(layer["best"]), _mean(layer["hit"]), layer["density"])
        cells = [str(number), *(_percent(share) for share in shares)]
        cells += [f"{_mean(heard[name]):.2f}" for name in ("snr", "measured")]
        if changes:
            error = changes[number]["error"]
            cells += [f"{changes[number]['mean']:+.4f}", "" if error is None else f"{error:.4f}"]
        rows.append(tuple(cells))
    return (*header, "loss change", "±") if changes else header, rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
