"""The recipe of ``mobazoo probe``. Plain data: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mobazoo.attention.pattern import MoBA
from mobazoo.config.data import Data
from mobazoo.errors import InputError


@dataclass(frozen=True, slots=True)
class Suggest:
    """The rule list that a probe ends with.

    Attributes:
        block_size: of the layers that get MoBA.
        top_k: of the layers that get MoBA, the own block included.
        full: layers to leave full (None: a quarter of them, rounded up).
        draws: random choices of as many layers that the suggestion is held against.
    """

    block_size: int = 64
    top_k: int = 3
    full: int | None = None
    draws: int = 8


@dataclass(frozen=True, slots=True)
class ProbeRecipe:
    """What MoBA would do to a checkpoint's layers and heads, measured on its full attention.

    Attributes:
        model: checkpoint folder or Hub id, with a tokenizer; its rules are set aside.
        data: where the texts come from; a text is the first ``length`` tokens of a document that has as many.
        block_sizes: to look at.
        top_k: to look at, the own block included; settings that read a text whole are left out.
        length: tokens of a text.
        documents: most texts; the loss by layer is ranked on one half of them and checked on the other.
        batch: texts at a time for losses.
        suggest: the setting that losses and the rule list are for (None: no loss is measured, nothing is suggested).
        dest: JSON file of the result (None: the console only).
        device: ``auto`` takes a GPU if there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16`` (None: as stored).
    """

    model: str
    data: Data
    block_sizes: list[int] = field(default_factory=lambda: [32, 64, 128])
    top_k: list[int] = field(default_factory=lambda: [2, 3, 4, 8])
    length: int = 1024
    documents: int = 16
    batch: int = 4
    suggest: Suggest | None = field(default_factory=Suggest)
    dest: str | None = None
    device: str = "auto"
    dtype: str | None = None

    def check(self) -> None:
        """Everything that can be known without the model and the texts.

        Raises:
            InputError: a value that no probe could use.
        """
        self.data.check("probe.data")
        for name, least in (("length", 2), ("documents", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"probe.{name}: want a number >= {least}, got {getattr(self, name)}")
        for name, least in (("block_sizes", 1), ("top_k", 2)):
            said = getattr(self, name)
            if not said or min(said) < least:
                raise InputError(f"probe.{name}: want numbers >= {least}, got {said}")
        if not self.settings():
            least_read = min(self.block_sizes) * min(self.top_k)
            raise InputError(
                f"probe.length: every setting reads a text of {self.length} tokens whole; "
                f"give more than block_size * top_k = {least_read} tokens, or smaller blocks"
            )
        if self.suggest is not None:
            self._check_suggest(self.suggest)

    def _check_suggest(self, suggest: Suggest) -> None:
        for name, least in (("block_size", 1), ("top_k", 2), ("full", 0), ("draws", 1)):
            value: Any = getattr(suggest, name)
            if value is not None and value < least:
                raise InputError(f"probe.suggest.{name}: want a number >= {least}, got {value}")
        if MoBA(suggest.block_size, suggest.top_k).covers(self.length):
            raise InputError(
                f"probe.suggest: block_size {suggest.block_size} and top_k {suggest.top_k} read a text of "
                f"{self.length} tokens whole, so no layer can lose; give longer texts or smaller blocks"
            )
        if self.documents < 4:
            raise InputError(
                f"probe.documents: want at least 4 to rank layers on half and check on the rest, got {self.documents}; "
                "suggest=null measures without"
            )

    def settings(self) -> list[MoBA]:
        """The grid and the setting of ``suggest``, without what would read a text whole."""
        grid = set(product(self.block_sizes, self.top_k))
        if self.suggest is not None:
            grid.add((self.suggest.block_size, self.suggest.top_k))
        patterns = [MoBA(size, k) for size, k in sorted(grid)]
        return [pattern for pattern in patterns if not pattern.covers(self.length)]
