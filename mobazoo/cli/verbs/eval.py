"""``mobazoo eval``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from mobazoo.cli.output import progress, table
from mobazoo.cli.work import DryRun, Outcome, Overrides, RecipeArgument, work, would_load
from mobazoo.config.eval import EvalRecipe
from mobazoo.config.recipe import load_recipe
from mobazoo.eval.tables import found_shares, harness_rows, loss_rows, recall_rows
from mobazoo.files import check_result_place

PLACE = ("3 Measure", 1)
EXAMPLES = """Example: mobazoo eval loss model=./Qwen3-0.6B-moba data.path=./texts

Example: mobazoo eval lm-eval model=./Qwen3-0.6B-moba data.path=./texts lm_eval.tasks='[arc_easy]'

Example: mobazoo eval loss model=./Qwen3-0.6B-moba data.path=stdlib length=8192 'settings.wide=[{top_k: 8}]'"""


def main(recipe: RecipeArgument, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Measure a checkpoint on texts under several attention settings: loss by position, recall, lm-eval's tasks."""
    work(sys.modules[__name__], recipe, overrides, dry_run)


def resolve(recipe: str, overrides: Sequence[str]) -> EvalRecipe:
    """The recipe, from recipes/eval if it is only named."""
    resolved = load_recipe(recipe, overrides, EvalRecipe, folder="eval")
    resolved.check()
    check_result_place(resolved.dest)
    resolved.require()
    return resolved


def plan(recipe: EvalRecipe) -> list[str]:
    """What would happen. A folder that is here is checked with every setting; the texts are not read."""
    lines = []
    if recipe.loss is not None or recipe.choices is not None:
        texts = f"up to {recipe.documents} texts of {recipe.length} tokens from {recipe.data.path}"
        lines.append(f"would read {texts}")
    if recipe.recall is not None:
        asked = recipe.recall
        prompts = len(asked.lengths) * len(asked.depths) * asked.samples
        lines.append(f"would hide {', '.join(asked.tasks)} in texts from {recipe.data.path}, {prompts} prompts a task")
    if recipe.lm_eval is not None:
        asked_for, written = recipe.lm_eval, recipe.lm_eval.synthetic
        names = [*asked_for.tasks, *(written.tasks if written is not None else ())]
        lines.append(f"would do {', '.join(names)} with lm-eval")
    settings = list(recipe.named_settings().values())
    lines.append(would_load(recipe.model, settings, recipe.device, recipe.dtype))
    lines.append(f"would compare the settings {', '.join(recipe.named_settings())}")
    return [*lines, f"would write {recipe.dest}"] if recipe.dest else lines


def execute(recipe: EvalRecipe) -> Outcome:
    """Measures, with a bar on a terminal, and prints the table."""
    import_module("mobazoo.zoo").register()  # for the tokenizer, which asks for the model's config
    with progress() as update:
        found = import_module("mobazoo.eval.evaluate").evaluate(recipe, update)
    said = []
    if "texts" in found:
        said.append(f"{found['texts']['count']} texts of {found['texts']['length']} tokens")
    if "loss" in found:
        texts = said[0]
        header, rows = loss_rows(found["loss"])
        table(f"Loss in nats, {texts}; difference to the first setting text by text", header, rows)
        said.append("loss " + ", ".join(f"{row[0]} {row[1]}" for row in rows))
    if "recall" in found:
        header, rows = recall_rows(found["recall"])
        samples = found["recall"]["samples"]
        table(
            f"Found in long texts, means over depths, {samples} prompts each; loss of the answer in nats", header, rows
        )
        said.append("found " + ", ".join(f"{name} {share}" for name, share in found_shares(found["recall"]).items()))
    if "lm_eval" in found:
        header, rows = harness_rows(found["lm_eval"])
        table(f"Tasks of lm-eval {found['lm_eval']['version']}", header, rows)
        said.append(f"{len({row[0] for row in rows})} tasks of lm-eval")
    return Outcome(", ".join(said), [recipe.dest] if recipe.dest else [])
