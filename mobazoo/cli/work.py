"""What verbs that work by a recipe share: their arguments, ``--dry-run``, and what makes a verb a stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from mobazoo.cli.output import say
from mobazoo.config.recipe import to_yaml
from mobazoo.config.shipped import RECIPES, Source, find, shipped

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Change keys of it, into lists too: attention[0].top_k=4"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and what would happen; do nothing.")]


@dataclass(frozen=True)
class Outcome:
    """What a verb did, in a line, and the files and folders it left."""

    line: str
    outputs: list[str] = field(default_factory=list)


class Stage(Protocol):
    """A verb that works by a recipe: a module with these functions, which ``mobazoo run`` can call too."""

    def resolve(self, recipe: str, overrides: Sequence[str]) -> Any:
        """The recipe as a dataclass; reads no more than YAML."""

    def plan(self, recipe: Any) -> list[str]:
        """What would happen, a line each; changes nothing."""

    def execute(self, recipe: Any) -> Outcome:
        """Does it."""


def work(verb: Stage, recipe: str, overrides: Sequence[str] | None, dry_run: bool) -> None:
    """A verb from its command line: resolve, then plan or execute."""
    resolved = verb.resolve(recipe, overrides or [])
    if dry_run:
        show_plan(resolved, verb.plan(resolved))
    else:
        say(verb.execute(resolved).line)


def recipe_or_model(given: str, folder: str) -> Source:
    """A recipe by path or name (from ``folder`` if it is only named), or one that says no more than the model.

    Raises:
        InputError: a recipe file that is not there.
    """
    names = shipped(RECIPES)
    if Path(given).is_file() or given.endswith(".yaml") or given in names or f"{folder}/{given}" in names:
        return find(given, RECIPES, folder)
    return Source(given, given, f"model: {json.dumps(given)}")


def is_here(name: str) -> bool:
    """Whether a checkpoint is a folder of this machine now."""
    return Path(name).expanduser().is_dir()


def not_here(name: str) -> str:
    """How a plan names a checkpoint that is not here; a stage before may write it."""
    return f"{name} (no folder here now; a Hub id if there is none by then)"


def would_load(
    name: str,
    rules: Sequence[Sequence[Mapping[str, Any]]],
    device: str,
    dtype: str | None,
    tokenizer: bool = True,
) -> str:
    """The line of a plan about a checkpoint; one that is here is checked with each list of rules, the Hub is not asked.

    Raises:
        InputError, UnsupportedError: it could not be loaded.
    """
    if not is_here(name):
        return f"would load {not_here(name)}"
    ready = import_module("mobazoo.checkpoint.ready")
    for attention in rules:
        ready.check_ready(name, attention=attention, device=device, dtype=dtype)
    if tokenizer:
        import_module("mobazoo.checkpoint.tokenizer").load_tokenizer(name)
    return f"would load {name}"


def show_plan(resolved: Any, plan: Sequence[str]) -> None:
    """What ``--dry-run`` prints: YAML that is a recipe again, the plan in its comments."""
    say(to_yaml(resolved).rstrip())
    for line in plan:
        say(f"# {line}")
