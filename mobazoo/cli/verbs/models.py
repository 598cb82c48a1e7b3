"""``mobazoo models``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mobazoo.cli.output import count, table, tokens
from mobazoo.config.models import model_entry, model_names

PLACE = ("1 Look", 1)
EXAMPLES = "Example: mobazoo models"
HEADER = ("name", "parameters", "layers", "heads", "context", "attention", "source", "licence")


def main() -> None:
    """List the model sizes that are shipped.

    Heads are query/key heads. `attention=[]` on a model is the same with full attention everywhere.
    """
    rows = []
    for name in model_names():
        entry = model_entry(name)
        config = entry.config
        heads = f"{config['num_attention_heads']}/{config['num_key_value_heads']}"
        context = tokens(config["max_position_embeddings"])
        size, setting = count(entry.parameters or 0), said(entry.attention)
        rows.append((name, size, config["num_hidden_layers"], heads, context, setting, entry.source, entry.licence))
    table("Models; `mobazoo show NAME` for one", HEADER, rows)


def said(rules: Sequence[Mapping[str, Any]]) -> str:
    """Rules in a few words: ``moba 4096 x 12, -3: full``."""
    parts = []
    for rule in rules:
        layers = "" if rule.get("layers", ":") == ":" else f"{rule['layers']} "
        sizes = f" {rule['block_size']} x {rule['top_k']}" if {"block_size", "top_k"} <= rule.keys() else ""
        parts.append(f"{layers}{rule.get('pattern', '')}{sizes}".strip())
    return ", ".join(parts) or "full"
