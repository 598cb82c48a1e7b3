"""``mobazoo convert``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from mobazoo.cli.output import progress, size
from mobazoo.cli.work import DryRun, Outcome, Overrides, RecipeArgument, is_here, not_here, work
from mobazoo.config.convert import ConvertRecipe
from mobazoo.config.recipe import load_recipe

if TYPE_CHECKING:
    from mobazoo.checkpoint.convert import ConvertReport
    from mobazoo.checkpoint.plan import Plan
    from mobazoo.checkpoint.verify import VerifyReport

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
    """What would happen. A folder that is here is checked as for the conversion itself; the Hub is not asked."""
    if not is_here(recipe.source):
        lines = [f"would read {not_here(recipe.source)}"]
    else:
        found: Plan = import_module("mobazoo.checkpoint.convert").plan_convert(recipe)
        same = sum(shard.same is not None for shard in found.shards)
        lines = [
            f"would read {recipe.source}",
            f"would link or copy {same} weight files and write {len(found.shards) - same}, {size(found.nbytes)} in all",
            *(
                f"would {what} {len(names)} tensors"
                for what, names in (("add", found.added), ("drop", found.dropped))
                if names
            ),
        ]
    proof = "prove the result before putting it in place" if recipe.verify else "prove nothing (verify: false)"
    return [*lines, f"would write {recipe.dest}", f"would {proof}"]


def execute(recipe: ConvertRecipe) -> Outcome:
    """Converts, with a bar on a terminal."""
    with progress() as update:
        report: ConvertReport = import_module("mobazoo.checkpoint.convert").convert(recipe, update)
    what = f"wrote {recipe.dest}: {report.tensors} tensors, {size(report.nbytes)}, {report.linked} files linked"
    return Outcome(f"{what}, {_proof(report.verified)}", [recipe.dest])


def _proof(verified: VerifyReport | None) -> str:
    if verified is None:
        return "not verified"
    found = verified.logits
    line = f"verified: logits within {found.difference:.1e} of transformers'"
    if found.moba_difference is None:
        return line
    return f"{line}, {found.moba_difference:.1e} with MoBA on {found.moba_tokens} tokens"
