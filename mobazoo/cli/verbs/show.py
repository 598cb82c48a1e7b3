"""``mobazoo show``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated

import typer

from mobazoo.cli.output import say, table
from mobazoo.cli.work import Overrides

if TYPE_CHECKING:
    from mobazoo.cli.describe import Described

PLACE = ("1 Look", 3)
EXAMPLES = """Example: mobazoo show llama3.1-8b attention[0].top_k=8

Example: mobazoo show ./Llama-3.1-8B-moba 'attention=[{backend: flash}]' --device cuda --dtype float16"""


def main(
    model: Annotated[
        str,
        typer.Argument(metavar="NAME|FILE|FOLDER", help="From `mobazoo models`, a model file, a folder or a Hub id."),
    ],
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: what the backends are chosen for.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of cache and backends; the checkpoint's own otherwise.")] = None,
) -> None:
    """Show what each layer of a model computes, by which backend and why, and what it costs.

    Keys read are exact, per query head and against full attention, as a mean over the layers.
    """
    describe = import_module("mobazoo.cli.describe")
    found: Described = describe.describe(model, overrides or [], device, dtype)
    table(found.name, ("fact", "value"), found.facts)
    say()
    table("Layers", describe.HEADER, found.rows)
