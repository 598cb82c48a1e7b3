"""The recipe of ``mobazoo eval``. Plain data: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mobazoo.config.data import Data
from mobazoo.config.rules import parse_rules
from mobazoo.errors import InputError


@dataclass(frozen=True, slots=True)
class LossTask:
    """Loss by position.

    Attributes:
        buckets: runs of positions, equally long.
        trailing: last positions of a text that the trailing loss is the mean of.
    """

    buckets: int = 8
    trailing: int = 256


@dataclass(frozen=True, slots=True)
class ChoicesTask:
    """Which blocks the queries of one text read.

    Attributes:
        setting: one of ``settings``, in which ``layers`` have MoBA.
        layers: layer numbers, negative from the end.
        heads: query heads (empty: all).
        text: number of the text.
    """

    setting: str
    layers: list[int] = field(default_factory=lambda: [0])
    heads: list[int] = field(default_factory=list)
    text: int = 0


@dataclass(frozen=True, slots=True)
class EvalRecipe:
    """What one set of weights does under several attention settings, on the same texts.

    Attributes:
        model: checkpoint folder or Hub id, with a tokenizer.
        data: where the texts come from; a text is the first ``length`` tokens of a document that has as many.
        settings: per-layer rules by name, each applied after the checkpoint's own, so ``[]`` is the checkpoint as it
            is (none: that alone). The others are compared with the first.
        dest: JSON file of the result (None: the console only).
        length: tokens of a text.
        documents: most texts.
        batch: texts at a time.
        loss: what to measure of the loss (None: nothing).
        choices: whose block choices to keep (None: nobody's).
        device: ``auto`` takes a GPU if there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16`` (None: as stored).
    """

    model: str
    data: Data
    settings: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    dest: str | None = None
    length: int = 1024
    documents: int = 64
    batch: int = 4
    loss: LossTask | None = field(default_factory=LossTask)
    choices: ChoicesTask | None = None
    device: str = "auto"
    dtype: str | None = None

    def check(self) -> None:
        """Everything that can be known without the model and the texts.

        Raises:
            InputError: a value that no evaluation could use.
        """
        self.data.check("eval.data")
        for name, least in (("length", 2), ("documents", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"eval.{name}: want a number >= {least}, got {getattr(self, name)}")
        for name, rules in self.named_settings().items():
            parse_rules(rules, f"eval.settings.{name}")
        if self.loss is not None:
            for name in ("buckets", "trailing"):
                if not 1 <= getattr(self.loss, name) < self.length:
                    raise InputError(
                        f"eval.loss.{name}: want 1 to {self.length - 1}, the predicted tokens of a text, "
                        f"got {getattr(self.loss, name)}"
                    )
        if self.choices is not None and self.choices.setting not in self.named_settings():
            known = ", ".join(self.named_settings())
            raise InputError(f"eval.choices.setting: want one of {known}, got {self.choices.setting!r}")
        if self.loss is None and self.choices is None:
            raise InputError("eval: loss and choices: both are null, so there is nothing to do; give one of them")

    def named_settings(self) -> dict[str, list[dict[str, Any]]]:
        """The settings; the checkpoint as it is where there are none."""
        return dict(self.settings) or {"as it is": []}
