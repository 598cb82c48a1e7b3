"""The recipe of ``mobazoo train``. Plain data: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from typing import Any

from mobazoo.config.convert import DIRECTIONS
from mobazoo.config.data import Data
from mobazoo.config.rules import parse_rules
from mobazoo.errors import InputError
from mobazoo.extras import require

DECAYS = ("cosine", "linear", "constant")
TRAINED_IN = ("float32", "bfloat16")  # nothing scales the loss as float16 needs it
DEVICES = ("auto", "cpu")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Stage:
    """Attention for a part of a run.

    Attributes:
        attention: per-layer rules, applied after the run's own.
        until: where it ends: a share of the run up to 1, or tokens (None: the end of the run, for the last stage).
    """

    attention: list[dict[str, Any]] = field(default_factory=list)
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters, which are trained instead of the weights and added to them at the end.

    Attributes:
        rank: of the adapters.
        alpha: their scale, over the rank.
        dropout: share of their inputs that is dropped while training.
        targets: names of the projections that get one.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: [*TARGETS])


@dataclass(frozen=True, slots=True)
class TrainRecipe:
    """One training run.

    Attributes:
        model: checkpoint folder, Hub id, or a model of the zoo, which starts with random weights.
        dest: folder to write, a checkpoint with its tokenizer and ``metrics.jsonl``.
        data: what to learn from.
        tokenizer: folder or Hub id (None: the model's).
        config: fields of a zoo model's config to change, such as ``hidden_size``.
        attention: per-layer rules, applied after the model's own.
        schedule: stages of attention over the run; a stage begins and ends exactly between two steps.
        validation: what to measure the loss on (None: nothing).
        length: tokens in a row; documents are packed into rows and cut where they are longer.
        batch: rows in a step, over all processes.
        micro_batch: rows in one forward of one process (None: the process's share of the batch).
        steps: steps of the optimizer; give this or ``tokens``.
        tokens: tokens in all, padding included, rounded up to whole steps.
        learning_rate: the highest.
        warmup: share of the steps in which the learning rate grows to it.
        decay: what it does afterwards: ``cosine`` or ``linear`` down to ``floor``, or ``constant``.
        floor: share of the learning rate that is left at the end of a cosine.
        weight_decay: of AdamW, on matrices only.
        beta2: of AdamW.
        clip: largest norm of all gradients together.
        dtype: of the weights while training; ``float32`` or ``bfloat16``.
        mixed: compute in bfloat16 over float32 weights.
        seed: of random weights and the order of the rows.
        device: ``auto`` takes a GPU if there is one.
        shard: with several processes, split weights and optimizer over them (FSDP2); false keeps a copy in each (DDP).
        sequence: processes that share each row, every one with a part of its queries.
        lora: train adapters instead of the weights (None: the weights).
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        compile: compile the model (``torch.compile``).
        log_every: steps between lines of the log and of ``metrics.jsonl``.
        tensorboard: also write TensorBoard's files, to ``<dest>.tensorboard``.
        evaluate_every: steps between measurements on ``validation``, besides one at the end (None: none).
        checkpoint_every: steps between checkpoints in ``<dest>.training`` (None: only when stopped by SIGTERM).
        keep: newest checkpoints to keep.
        resume: go on from the newest complete checkpoint there; false removes them and begins anew.
        to: ``zoo``, or ``hf`` for a plain checkpoint, which has full attention in every layer.
        overwrite: whether a checkpoint already at ``dest`` may be replaced.
    """

    model: str
    dest: str
    data: Data
    tokenizer: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    attention: list[dict[str, Any]] = field(default_factory=list)
    schedule: list[Stage] = field(default_factory=list)
    validation: Data | None = None
    length: int = 4096
    batch: int = 8
    micro_batch: int | None = None
    steps: int | None = None
    tokens: int | None = None
    learning_rate: float = 3e-4
    warmup: float = 0.02
    decay: str = "cosine"
    floor: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95
    clip: float = 1.0
    dtype: str = "float32"
    mixed: bool = False
    seed: int = 0
    device: str = "auto"
    shard: bool = True
    sequence: int = 1
    lora: Lora | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = 10
    tensorboard: bool = False
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    resume: bool = True
    to: str = "zoo"
    overwrite: bool = False

    @property
    def total_steps(self) -> int:
        """Steps of the optimizer, however they were asked for."""
        if self.steps is not None:
            return self.steps
        return ceil((self.tokens or 0) / (self.batch * self.length))

    @property
    def ends(self) -> tuple[int, ...]:
        """The step that each stage of the schedule ends before, counted from 0."""
        total, per_step = self.total_steps, self.batch * self.length
        untils = [1.0 if stage.until is None else stage.until for stage in self.schedule]
        return tuple(round(until * total) if until <= 1 else ceil(until / per_step) for until in untils)

    def check(self) -> None:
        """Everything that can be known without looking at model and data.

        Raises:
            InputError: a value that no run could use.
        """
        self.data.check("train.data")
        if self.validation is not None:
            self.validation.check("train.validation")
        parse_rules(self.attention, "train.attention")
        self._check_choices()
        if (self.steps is None) == (self.tokens is None):
            raise InputError("train: give either steps or tokens, which says how long the run is")
        for name, least in (("length", 2), ("batch", 1), ("micro_batch", 1), ("steps", 1), ("tokens", 1)):
            self._check_least(name, least)
        self._check_least("sequence", 1)
        if self.sequence > 1 and self.compile:
            raise InputError("train.compile: does not go with sequence; leave one out")
        if self.length % self.sequence:
            raise InputError(f"train.length: {self.length} is no multiple of sequence, {self.sequence}; choose one")
        for name in ("log_every", "evaluate_every", "checkpoint_every", "keep"):
            self._check_least(name, 1)
        self._check_schedule()
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise InputError(
                f"train.micro_batch: a batch of {self.batch} rows is no multiple of {self.micro_batch}; take a divisor"
            )
        if self.mixed and self.dtype != "float32":
            raise InputError(f"train.mixed: works over float32 weights, and dtype is {self.dtype}; leave one out")
        if self.validation is not None and self.validation.streaming and self.validation.max_documents is None:
            raise InputError("train.validation.max_documents: a stream has no end; say how many to measure on")
        if self.lora is not None and (self.lora.rank < 1 or not 0 <= self.lora.dropout < 1 or not self.lora.targets):
            raise InputError("train.lora: want rank >= 1, dropout from 0 up to 1 and at least one target")
        if self.evaluate_every is not None and self.validation is None:
            raise InputError("train.evaluate_every: there is no validation to measure on; give train.validation")

    def require(self) -> None:
        """Refuses to begin without the libraries that the run needs.

        Raises:
            UnsupportedError: one that is not here, with the extra that brings it.
        """
        require("accelerate", "train", "mobazoo[train]")
        if self.lora is not None:
            require("peft", "train.lora", "mobazoo[lora]")
        if self.tensorboard:
            require("tensorboard", "train.tensorboard", "mobazoo[tensorboard]")
        for data in (self.data, self.validation):
            if data is not None:
                data.require()

    def _check_schedule(self) -> None:
        before = 0
        for i, (stage, end) in enumerate(zip(self.schedule, self.ends, strict=True)):
            where = f"train.schedule[{i}]"
            parse_rules(stage.attention, f"{where}.attention")
            if stage.until is None and i + 1 < len(self.schedule):
                raise InputError(f"{where}.until: missing; only the last stage may leave it out")
            if end <= before:
                raise InputError(
                    f"{where}.until: {stage.until} ends before step {end + 1}, and the stage begins at step "
                    f"{before + 1}; give a later end, as a share of the run or in tokens"
                )
            before = end
        if self.schedule and before != self.total_steps:
            raise InputError(
                f"train.schedule: ends after step {before}, and the run after step {self.total_steps}; leave out the "
                "last stage's until"
            )

    def _check_choices(self) -> None:
        choices = (("decay", DECAYS), ("dtype", TRAINED_IN), ("device", DEVICES), ("to", DIRECTIONS))
        for name, known in choices:
            if getattr(self, name) not in known:
                raise InputError(f"train.{name}: want one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"train.learning_rate: want a number > 0, got {self.learning_rate}")
        if not 0 < self.clip < float("inf"):
            raise InputError(f"train.clip: want a number > 0, got {self.clip}")
        for name in ("warmup", "floor", "weight_decay", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"train.{name}: want a share from 0 up to 1, got {getattr(self, name)}")

    def _check_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise InputError(f"train.{name}: want an integer >= {least}, got {value}")
