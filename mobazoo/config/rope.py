"""Longer contexts over rotary frequencies that are scaled already: ``moba.rope``. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from mobazoo.config.keys import refuse_unknown
from mobazoo.errors import InputError

EXTENSIONS = ("linear", "yarn")


@dataclass(frozen=True, slots=True)
class RopeStep:
    """One extension of a context, applied to the frequencies of ``rope_parameters`` and of the steps before it.

    Attributes:
        type: ``linear`` (position interpolation, arXiv 2306.15595) or ``yarn`` (arXiv 2309.00071).
        factor: new context over old, > 1.
        original_max_position_embeddings: the old context in tokens.
    """

    type: str
    factor: float
    original_max_position_embeddings: int


STEP_KEYS = tuple(field.name for field in fields(RopeStep))


def rope_steps(moba: Mapping[str, Any] | None) -> tuple[RopeStep, ...]:
    """The steps in a config's object ``moba``.

    Raises:
        InputError: something that is no list of steps.
    """
    said = (moba or {}).get("rope") or []
    if not isinstance(said, list):
        raise InputError(f"moba.rope: want a list of steps like [{{type: linear, factor: 4.0, ...}}], got {said!r}")
    return tuple(_step(step, f"moba.rope[{i}]") for i, step in enumerate(said))


def _step(said: object, where: str) -> RopeStep:
    if not isinstance(said, Mapping) or set(STEP_KEYS) - said.keys():
        raise InputError(f"{where}: want a mapping with {', '.join(STEP_KEYS)}, got {said!r}")
    refuse_unknown(said, STEP_KEYS, where)
    step = RopeStep(**said)
    if step.type not in EXTENSIONS:
        raise InputError(f"{where}.type: want one of {', '.join(EXTENSIONS)}, got {step.type!r}")
    if not isinstance(step.factor, int | float) or not isfinite(step.factor) or not step.factor > 1:
        raise InputError(f"{where}.factor: want a number > 1, got {step.factor!r}")
    length = step.original_max_position_embeddings
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise InputError(f"{where}.original_max_position_embeddings: want an integer >= 1, got {length!r}")
    return step
