"""The recipe of ``mobazoo bench RECIPE``. Plain data: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mobazoo.config.rules import parse_rules
from mobazoo.errors import InputError


@dataclass(frozen=True, slots=True)
class BenchRecipe:
    """Prefill time of a checkpoint by length, with full attention and with its own rules.

    Attributes:
        model: checkpoint folder or Hub id.
        attention: per-layer rules, applied after the checkpoint's own.
        lengths: tokens of the prompts, random ones.
        rounds: times each is timed, the two settings in turn.
        dest: JSON file of the result (None: the console only).
        device: ``auto`` takes a GPU if there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16`` (None: as stored).
    """

    model: str
    attention: list[dict[str, Any]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [1024, 2048, 4096, 8192])
    rounds: int = 3
    dest: str | None = None
    device: str = "auto"
    dtype: str | None = None

    def check(self) -> None:
        """Everything that can be known without the model.

        Raises:
            InputError: a value that no timing could use.
        """
        parse_rules(self.attention, "bench.attention")
        if not self.lengths or min(self.lengths) < 1:
            raise InputError(f"bench.lengths: want at least one number of tokens >= 1, got {self.lengths}")
        if self.rounds < 1:
            raise InputError(f"bench.rounds: want a number >= 1, got {self.rounds}")
