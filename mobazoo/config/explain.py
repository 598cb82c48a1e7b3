"""The recipe of ``mobazoo explain``. Plain data: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mobazoo.config.dtypes import DTYPES
from mobazoo.config.rules import parse_rules
from mobazoo.errors import InputError


@dataclass(frozen=True, slots=True)
class ExplainRecipe:
    """What the attention of a model costs at a length, full and by its rules.

    Attributes:
        model: a model of the zoo, a model file, a checkpoint folder or Hub id; only its configuration is read.
        attention: per-layer rules, applied after the model's own.
        length: tokens of the prompt.
        measure: whether to time attention at that length on this machine too.
        rounds: times each is timed.
        device: ``auto`` takes a GPU if there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
    """

    model: str
    attention: list[dict[str, Any]] = field(default_factory=list)
    length: int = 8192
    measure: bool = False
    rounds: int = 3
    device: str = "auto"
    dtype: str = "float32"

    def check(self) -> None:
        """Everything that can be known without the model.

        Raises:
            InputError: a value that no model could use.
        """
        parse_rules(self.attention, "explain.attention")
        if self.dtype not in DTYPES:
            raise InputError(f"explain.dtype: want one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name in ("length", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"explain.{name}: want a number >= 1, got {getattr(self, name)}")
