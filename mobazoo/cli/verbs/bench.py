"""``mobazoo bench``: by a recipe on a checkpoint, or by the options of ``mobazoo.bench``, which need torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import typer

from mobazoo.cli.output import progress, table
from mobazoo.cli.sweeps import HEADER, sweep_rows
from mobazoo.cli.work import Outcome, work, would_load
from mobazoo.config.bench import BenchRecipe
from mobazoo.config.recipe import has_key, parse_recipe
from mobazoo.config.shipped import RECIPES, find
from mobazoo.config.sweep import SweepRecipe
from mobazoo.files import check_result_place

PLACE = ("3 Measure", 2)
EXAMPLES = """Example: mobazoo bench prefill model=./Llama-3.1-8B-moba lengths='[8192, 32768]'

Example: mobazoo bench flashmoba lengths='[4096, 8192]' dest=flashmoba.json

Example: mobazoo bench --length 16384 --block-size 128 --top-k 8 --backward"""
# `mobazoo.bench` has a `--help` of its own that lists its options.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
DRY_RUN = "--dry-run"


def main(context: typer.Context) -> None:
    """Time MoBA against full attention on this machine: a checkpoint by a recipe, or attention alone by options."""
    words, rest = context.args, [word for word in context.args if word != DRY_RUN]
    if rest and not rest[0].startswith("-") and "--help" not in rest:
        work(sys.modules[__name__], rest[0], rest[1:], DRY_RUN in words)
        return
    if "--help" in words:
        words = ["--help"]
    code = import_module("mobazoo.bench.command").app(words, prog_name="mobazoo bench", standalone_mode=False)
    if code:
        raise typer.Exit(code)


def resolve(recipe: str, overrides: Sequence[str]) -> BenchRecipe | SweepRecipe:
    """The recipe, from recipes/bench if it is only named: of a checkpoint where it has a model, else of attention."""
    source = find(recipe, RECIPES, "bench")
    schema: type[BenchRecipe | SweepRecipe] = BenchRecipe if has_key(source, "model") else SweepRecipe
    resolved = parse_recipe(source, overrides, schema)
    resolved.check()
    check_result_place(resolved.dest)
    return resolved


def plan(recipe: BenchRecipe | SweepRecipe) -> list[str]:
    """What would happen. A folder that is here is checked; the Hub is not asked."""
    lengths, written = ", ".join(map(str, recipe.lengths)), [f"would write {recipe.dest}"] if recipe.dest else []
    if isinstance(recipe, SweepRecipe):
        import_module("mobazoo.bench.sweep").check_backends(recipe)
        names = ", ".join([*recipe.against, *(f"MoBA by {name}" for name in recipe.backends)])
        what = f"would time {', '.join(recipe.modes)} of {lengths} tokens in {', '.join(recipe.dtypes)}"
        return [what, f"would compare {names}, {recipe.rounds} rounds", *written]
    load = would_load(recipe.model, [recipe.attention], recipe.device, recipe.dtype, tokenizer=False)
    return [load, f"would time prefill of {lengths} tokens, {recipe.rounds} rounds", *written]


def execute(recipe: BenchRecipe | SweepRecipe) -> Outcome:
    """Times, with a bar on a terminal, and prints the table."""
    return _sweep(recipe) if isinstance(recipe, SweepRecipe) else _prefill(recipe)


def _sweep(recipe: SweepRecipe) -> Outcome:
    with progress() as update:
        found = import_module("mobazoo.bench.sweep").time_sweep(recipe, update)
    heads = f"{recipe.query_heads}/{recipe.key_heads} heads of {recipe.head_dim}"
    title = f"Attention, {recipe.batch} x {heads}; medians of {recipe.rounds} rounds, ratios round by round"
    table(title, HEADER, list(sweep_rows(found)))
    runs = [run for row in found["sweep"] for run in row["runs"]]
    left = sum("skipped" in run for run in runs)
    said = f"{len(runs) - left} of {len(runs)} timed" + (f", {left} left out for the reasons above" if left else "")
    return Outcome(said, [recipe.dest] if recipe.dest else [])


def _prefill(recipe: BenchRecipe) -> Outcome:
    with progress() as update:
        found = import_module("mobazoo.bench.prefill").time_prefill(recipe, update)
    rows = [
        (
            row["length"],
            f"{row['full_median_s']:.3f}",
            f"{row['moba_median_s']:.3f}",
            f"{row['speedup']:.2f}",
            f"{row['speedup_min']:.2f} to {row['speedup_max']:.2f}",
            f"{100 * row['share_read']:.3g} %",
        )
        for row in found["prefill"]
    ]
    header = ("tokens", "full s", "MoBA s", "times faster", "range", "keys")
    table(f"Prefill of {recipe.model}, medians of {recipe.rounds} rounds", header, rows)
    last = rows[-1]
    return Outcome(f"prefill of {last[0]} tokens {last[3]} times as fast", [recipe.dest] if recipe.dest else [])
