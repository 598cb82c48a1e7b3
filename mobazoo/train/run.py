"""``train``: one run from recipe to checkpoint folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

import torch
from torch import distributed, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from mobazoo.checkpoint.folder import read_json
from mobazoo.checkpoint.place import METRICS, free_place
from mobazoo.config.rules import LayerAttention
from mobazoo.config.train import TrainRecipe
from mobazoo.data.collate import Collator
from mobazoo.data.documents import read_documents
from mobazoo.data.rows import Row, Rows
from mobazoo.data.source import find_files
from mobazoo.data.stream import Stream
from mobazoo.data.tokens import Progress, tokenize
from mobazoo.errors import Stopped
from mobazoo.explain import groups
from mobazoo.files import TRAINING, beside
from mobazoo.train.checkpoints import STATE, check_identity, clear, newest, owned, step_of
from mobazoo.train.engine import Finite, Runner, Saver, arguments
from mobazoo.train.evaluate import Losses
from mobazoo.train.export import export, write_model
from mobazoo.train.lora import adapted, merged, read_adapter, write_adapter
from mobazoo.train.metrics import Log, Metrics
from mobazoo.train.order import Order, Shared
from mobazoo.train.parallel import is_launched, shard, share_rows
from mobazoo.train.schedule import Switch
from mobazoo.train.setup import Setup, make_model, prepare, provenance
from mobazoo.train.speed import operations_per_token, peak, share_of_keys
from mobazoo.train.state import whole_weights
from mobazoo.train.watch import Evaluation


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a recipe comes to.

    Attributes:
        parameters: of the model.
        steps: of the optimizer.
        rows: in all steps.
        tokens: in all steps, padding included.
        random: whether the model starts with random weights.
    """

    parameters: int
    steps: int
    rows: int
    tokens: int
    random: bool


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a run did.

    Attributes:
        dest: the folder that is now there.
        steps: of the optimizer.
        tokens: in all steps, padding included.
        loss: mean training loss since the last line of the log.
        validation: at the end, if there is validation data.
        seconds: time taken.
    """

    dest: Path
    steps: int
    tokens: int
    loss: float
    validation: Losses | None
    seconds: float


def plan_train(recipe: TrainRecipe) -> TrainPlan:
    """Everything ``train`` checks before it reads data.

    Raises:
        InputError, UnsupportedError: as ``train``.
    """
    recipe.require()
    setup = prepare(recipe)
    _check_files(recipe)
    free_place(recipe.dest, recipe.overwrite)
    return _plan(recipe, setup)


def train(recipe: TrainRecipe, progress: Progress | None = None, log: Log | None = None) -> TrainReport:
    """Trains a model; ``recipe.dest`` appears complete, or stays as it was.

    Args:
        recipe: what to do.
        progress: told ``(stage, done, in all)`` for the stages ``load``, ``tokenize``, ``train`` and ``evaluate``.
        log: told each line of the log.

    Raises:
        InputError: model, data or place that cannot be used; all but the data are checked before it is read.
        UnsupportedError: a model the zoo does not have, or a library that is not here.
    """
    started = monotonic()
    recipe.require()
    setup = prepare(recipe)
    _check_files(recipe)
    dest = free_place(recipe.dest, recipe.overwrite)
    work = beside(dest, TRAINING)
    args = arguments(recipe, work)
    first = args.process_index == 0
    with owned(work) if first else nullcontext():
        job = _Job(recipe, setup, args, work, progress if first else None, log if first else _silent)
        report = job.run(dest)
    if first:
        shutil.rmtree(work, ignore_errors=True)
    return replace(report, seconds=monotonic() - started)


class _Job:
    """One run, once everything that can be checked without data was."""

    def __init__(
        self,
        recipe: TrainRecipe,
        setup: Setup,
        args: TrainingArguments,
        work: Path,
        progress: Progress | None,
        log: Log | None,
    ) -> None:
        self.recipe, self.setup, self.args, self.work = recipe, setup, args, work
        self.progress, self.log = progress, log or _silent
        self.plan = _plan(recipe, setup)

    def run(self, dest: Path) -> TrainReport:
        """Trains and exports."""
        recipe, setup = self.recipe, self.setup
        resumed = agreed(self._resumed() if self.args.process_index == 0 else None)
        order = self._order()
        held_out = _rows(recipe, setup, self.progress, validation=True) if recipe.validation else None
        model = make_model(setup, recipe, self.progress, None if recipe.lora else resumed)
        share_rows(model, recipe.sequence)
        trained: nn.Module = model
        if recipe.lora is not None:
            torch.manual_seed(recipe.seed)
            trained = adapted(model, recipe.lora)
            if resumed is not None:
                read_adapter(resumed, trained)
        if is_launched() and recipe.shard:
            shard(model, self.args.device)
        switch = Switch(setup.schedule, model, self._say_stage)
        metrics = Metrics(
            recipe,
            self.work / METRICS,
            lambda: share_of_keys(switch.layers, order.sizes),
            lambda rate: self._mfu(rate, switch.layers, order.sizes),
            self.progress,
            self.log,
        )
        if self.args.process_index == 0:
            metrics.rewind((step_of(resumed) or 0) if resumed else 0)
        watch = Evaluation(recipe, model, held_out, metrics, self.progress, self.log)
        saver = Saver(recipe.checkpoint_every)
        origin = provenance(recipe, setup)
        trainer = Runner(
            self.work,
            write_adapter
            if recipe.lora
            else lambda folder, weights: write_model(model, setup.tokenizer, folder, origin, weights),
            recipe,
            model=trained,
            args=self.args,
            data_collator=Collator(recipe.length, fixed=recipe.compile),
            train_dataset=self._dealt(order),
            callbacks=[Finite(self.work), switch, metrics, watch, saver],
        )
        with saver.listening():
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        if saver.stopped:
            raise Stopped(
                f"stopped by SIGTERM after step {trainer.state.global_step} of {self.plan.steps}; the same command "
                f"goes on from the checkpoint in {self.work}"
            )
        if held_out is not None and watch.last is None:  # killed between the last step and here
            watch.measure(self.args, trainer.state.global_step)
        if recipe.lora is not None:
            model = merged(trained)
        weights = whole_weights(model)
        if self.args.process_index == 0:
            plain = setup.family if recipe.to == "hf" else None
            export(
                model,
                setup.tokenizer,
                dest,
                origin,
                metrics=self.work / METRICS,
                plain=plain,
                replace=recipe.overwrite,
                state=weights,
            )
        trainer.accelerator.wait_for_everyone()
        logged = [said["loss"] for said in trainer.state.log_history if "loss" in said]
        return TrainReport(dest, self.plan.steps, self.plan.tokens, logged[-1], watch.last, 0.0)

    def _order(self) -> Order | Stream:
        recipe, setup = self.recipe, self.setup
        if recipe.data.streaming:
            self.log(f"{self.plan.parameters:,} parameters; rows of {recipe.length} while the data are read")
            return Stream(
                lambda: read_documents(recipe.data), setup.tokenizer, recipe.length, self.plan.rows, recipe.seed
            )
        rows = _rows(recipe, setup, self.progress)
        padding = 1 - rows.used / (len(rows) * rows.length)
        self.log(
            f"{self.plan.parameters:,} parameters; {len(rows):,} rows of {rows.length} ({padding:.1%} padding), "
            f"{self.plan.rows / len(rows):.2f} passes over them"
        )
        return Order(rows, self.plan.rows, recipe.seed)

    def _dealt(self, order: Order | Stream) -> Dataset[Row]:
        if self.recipe.sequence == 1:
            return order
        micro = self.args.per_device_train_batch_size
        return Shared(order, self.plan.rows, micro, self.args.world_size, self.recipe.sequence)

    def _mfu(self, rate: float, layers: Sequence[LayerAttention], sizes: Mapping[int, int]) -> float | None:
        most = peak(self.args.device)
        if most is None:
            return None
        cost = operations_per_token(self.setup.config, self.plan.parameters, layers, sizes)
        return rate * cost / (most * self.args.world_size)

    def _resumed(self) -> Path | None:
        """The checkpoint to go on from; what is to be skipped is logged."""
        if not self.recipe.resume:
            clear(self.work)
            return None
        found = newest(self.work)
        for line in found.skipped:
            self.log(line)
        if found.folder is not None:
            check_identity(found.folder, self.recipe)
            said = read_json(found.folder / STATE)
            self.log(f"resuming from {found.folder}, after step {said['step']} of {self.plan.steps}")
            if said["processes"] != self.args.world_size:
                self.log(
                    f"the checkpoint is of {said['processes']} processes, here are {self.args.world_size}: it goes "
                    "on with the same rows, but not bit for bit"
                )
        return found.folder

    def _say_stage(self, stage: int, step: int) -> None:
        if self.recipe.schedule:
            layers = self.setup.schedule.layers[stage]
            said = "; ".join(f"layers {which}: {layer.pattern}" for which, _, layer in groups(layers))
            self.log(f"step {step + 1}: attention stage {stage + 1} of {len(self.recipe.schedule)}: {said}")


def agreed(value: Path | None) -> Path | None:
    """What the first process says, in all processes."""
    if not distributed.is_initialized():
        return value
    said = [value]
    distributed.broadcast_object_list(said)
    return said[0]


def _silent(line: str) -> None:
    """Other processes than the first say nothing."""


def _check_files(recipe: TrainRecipe) -> None:
    for data in (recipe.data, recipe.validation):
        if data is not None and data.format != "hub":
            find_files(data)


def _plan(recipe: TrainRecipe, setup: Setup) -> TrainPlan:
    steps = recipe.total_steps
    rows = steps * recipe.batch
    return TrainPlan(setup.parameters, steps, rows, rows * recipe.length, setup.random)


def _rows(recipe: TrainRecipe, setup: Setup, progress: Progress | None, validation: bool = False) -> Rows:
    data = recipe.validation if validation else recipe.data
    assert data is not None
    return Rows(tokenize(read_documents(data), setup.tokenizer, progress), recipe.length)
