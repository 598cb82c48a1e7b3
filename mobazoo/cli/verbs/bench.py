"""``mobazoo bench``: hands its arguments to ``mobazoo.bench``, whose options need torch to be known."""

from __future__ import annotations

from importlib import import_module

import typer

PLACE = ("3 Measure", 1)
EXAMPLES = "Example: mobazoo bench --length 16384 --block-size 128 --top-k 8 --backward"
# Its own `--help` lists the options.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def main(context: typer.Context) -> None:
    """Time MoBA against full attention on this machine."""
    code = import_module("mobazoo.bench").app(context.args, prog_name="mobazoo bench", standalone_mode=False)
    if code:
        raise typer.Exit(code)
