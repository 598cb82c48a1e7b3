"""``mobazoo recipes``."""

from __future__ import annotations

from mobazoo.cli.output import table
from mobazoo.config.shipped import RECIPES, shipped

PLACE = ("1 Look", 2)
EXAMPLES = "Example: mobazoo recipes"


def main() -> None:
    """List the recipes that are shipped, what each is for and its command."""
    rows = [(name, source.purpose, source.command) for name, source in shipped(RECIPES).items()]
    table("Recipes; `mobazoo copy NAME DEST` to change one", ("name", "purpose", "command"), rows)
