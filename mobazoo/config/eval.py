"""The recipe of ``mobazoo eval``. Plain data: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobazoo.config.data import Data
from mobazoo.config.keys import nearest
from mobazoo.config.rules import parse_rules
from mobazoo.errors import InputError
from mobazoo.extras import require


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


RECALL_TASKS = ("needle", "passkey", "multikey", "tracking")


@dataclass(frozen=True, slots=True)
class RecallTask:
    """Finding what a long text hides.

    Attributes:
        tasks: ``needle`` (one sentence), ``passkey`` (a number said twice), ``multikey`` (one sentence of many like it)
            and ``tracking`` (variables assigned from each other), after RULER (arXiv 2404.06654).
        lengths: tokens of the prompts.
        depths: where in the text what is asked for stands, 0 at its beginning and 1 at its end.
        samples: prompts for each task, length and depth.
        keys: sentences of ``multikey``, at most 30.
        hops: assignments after the first of ``tracking``.
    """

    tasks: list[str] = field(default_factory=lambda: list(RECALL_TASKS))
    lengths: list[int] = field(default_factory=lambda: [1024])
    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    samples: int = 4
    keys: int = 4
    hops: int = 2

    def check(self, where: str = "eval.recall") -> None:
        """Everything that can be known without the model and the texts.

        Raises:
            InputError: a value that no prompt could have.
        """
        for name in self.tasks:
            if name not in RECALL_TASKS:
                raise InputError(f"{where}.tasks: unknown task {name!r}; {nearest(name, RECALL_TASKS)}")
        for name in ("tasks", "lengths", "depths"):
            if not getattr(self, name):
                raise InputError(f"{where}.{name}: want at least one, got none")
        if min(self.lengths) < 1:
            raise InputError(f"{where}.lengths: want numbers of tokens >= 1, got {self.lengths}")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"{where}.depths: want shares from 0 to 1, got {self.depths}")
        for name, least, most in (("samples", 1, None), ("keys", 1, 30), ("hops", 1, None)):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                bound = f">= {least}" if most is None else f"from {least} to {most}"
                raise InputError(f"{where}.{name}: want a number {bound}, got {value}")


@dataclass(frozen=True, slots=True)
class LmEvalTask:
    """Tasks of lm-eval (the extra ``lm-eval``).

    Attributes:
        tasks: names of its own tasks, or of those in ``include``.
        include: folder of task files of your own, as lm-eval reads them (None: no such folder).
        synthetic: prompts of our own as tasks of lm-eval, written for each task and length (None: none); they need no
            network.
        limit: most samples of a task (None: all).
    """

    tasks: list[str] = field(default_factory=list)
    include: str | None = None
    synthetic: RecallTask | None = None
    limit: int | None = None

    def check(self) -> None:
        """Everything that can be known without lm-eval.

        Raises:
            InputError: nothing to do, or no such folder.
        """
        where = "eval.lm_eval"
        if not self.tasks and self.synthetic is None:
            raise InputError(f"{where}.tasks: want at least one, or {where}.synthetic, got none")
        if self.include is not None and not Path(self.include).expanduser().is_dir():
            raise InputError(f"{where}.include: want a folder of task files, there is none at {self.include}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"{where}.limit: want a number >= 1, got {self.limit}")
        if self.synthetic is not None:
            self.synthetic.check(f"{where}.synthetic")


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
        recall: what to look for in long texts (None: nothing).
        lm_eval: which tasks of lm-eval to do (None: none).
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
    recall: RecallTask | None = None
    lm_eval: LmEvalTask | None = None
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
        if self.recall is not None:
            self.recall.check()
        if self.lm_eval is not None:
            self.lm_eval.check()
        if self.loss is None and self.choices is None and self.recall is None and self.lm_eval is None:
            raise InputError(
                "eval: loss, choices, recall and lm_eval are all null, so there is nothing to do; give one of them"
            )

    def require(self) -> None:
        """Refuses to begin without the libraries it needs.

        Raises:
            UnsupportedError: one that is not here.
        """
        self.data.require()
        if self.lm_eval is not None:
            require("lm_eval", "eval.lm_eval", "mobazoo[lm-eval]")

    def named_settings(self) -> dict[str, list[dict[str, Any]]]:
        """The settings; the checkpoint as it is where there are none."""
        return dict(self.settings) or {"as it is": []}
