"""The same weights under several attention settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mobazoo.nn.causal_lm import MobaForCausalLM


@contextmanager
def setting(model: MobaForCausalLM, rules: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Applies rules after the model's own, and puts its own back.

    Raises:
        InputError, UnsupportedError: rules that the model cannot have.
    """
    own = [rule.as_dict() for rule in model.config.attention_rules()]
    model.set_attention([*own, *rules])
    try:
        yield
    finally:
        model.set_attention(own)
