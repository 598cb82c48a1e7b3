"""``python -m mobazoo.bench``."""

from mobazoo.bench.command import app

app()
