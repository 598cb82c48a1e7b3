"""The command line, ``mobazoo``. A verb is a module in ``mobazoo/cli/verbs``; importing this needs no torch."""

from mobazoo.cli.assemble import app, main

__all__ = ["app", "main"]
