"""``mobazoo copy``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mobazoo.cli.output import say
from mobazoo.cli.work import DryRun
from mobazoo.config.shipped import MODELS, RECIPES, find
from mobazoo.errors import InputError

PLACE = ("1 Look", 4)
EXAMPLES = "Example: mobazoo copy convert/moba-4096x12 mine.yaml && mobazoo convert mine.yaml source=... dest=..."


def main(
    name: Annotated[str, typer.Argument(help="A recipe or model by name.")],
    dest: Annotated[Path, typer.Argument(help="The file to write, or a folder for it. Nothing is overwritten.")],
    dry_run: DryRun = False,
) -> None:
    """Copy a recipe or model file for editing."""
    try:
        source = find(name, RECIPES)
    except InputError as not_a_recipe:
        try:
            source = find(name, MODELS)
        except InputError:
            raise not_a_recipe from None
    target = dest / f"{source.name.rpartition('/')[2]}.yaml" if dest.is_dir() else dest
    if target.exists():
        raise InputError(f"{target}: is there already; name another file or remove it")
    if not dry_run:
        try:
            with target.open("x", encoding="utf-8") as file:
                file.write(source.text)
        except OSError as error:
            raise InputError(f"{target}: cannot be written: {error.strerror}") from None
    say(f"{'would write' if dry_run else 'wrote'} {target}")
