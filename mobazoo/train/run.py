"""``train``: one run from recipe to checkpoint folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mobazoo._version import __version__
from mobazoo.checkpoint.place import METRICS, free_place
from mobazoo.checkpoint.staging import named_errors
from mobazoo.config.recipe import plain
from mobazoo.config.train import TrainRecipe
from mobazoo.data.documents import read_documents
from mobazoo.data.rows import Rows
from mobazoo.data.tokens import tokenize
from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.train.engine import arguments, make_trainer, require_accelerate
from mobazoo.train.evaluate import Losses, evaluate
from mobazoo.train.export import export
from mobazoo.train.metrics import Log, Metrics, share_of_keys
from mobazoo.train.order import Order
from mobazoo.train.setup import Setup, make_model, prepare

Progress = Callable[[str, int, int], None]


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
        rows: rows the data makes; more steps than that see them again.
        padding: share of slots that are padding.
        loss: mean training loss since the last line of the log.
        validation: at the end, if there is validation data.
        seconds: time taken.
    """

    dest: Path
    steps: int
    tokens: int
    rows: int
    padding: float
    loss: float
    validation: Losses | None
    seconds: float


def plan_train(recipe: TrainRecipe) -> TrainPlan:
    """Everything ``train`` checks before it reads data.

    Raises:
        InputError, UnsupportedError: as ``train``.
    """
    require_accelerate()
    setup = prepare(recipe)
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
    require_accelerate()
    setup = prepare(recipe)
    dest = free_place(recipe.dest, recipe.overwrite)
    work = dest.with_name(f"{dest.name}.training")
    args = arguments(recipe, work)
    rows = _rows(recipe, setup, progress)
    held_out = _rows(recipe, setup, progress, validation=True) if recipe.validation else None
    plan = _plan(recipe, setup)
    if log is not None:
        passes = plan.rows / len(rows)
        log(f"{plan.parameters:,} parameters; {len(rows):,} rows of {recipe.length}, {passes:.2f} passes over them")
    model = make_model(setup, recipe, progress)
    with named_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        (work / METRICS).write_text("", "utf-8")
    share = share_of_keys(setup.layers, rows)
    metrics = Metrics(recipe, work / METRICS, lambda: share, progress, log)
    watch = Evaluation(recipe, model, held_out, metrics, progress, log)
    trainer = make_trainer(model, recipe, args, Order(rows, plan.rows, recipe.seed), [metrics, watch])
    trainer.train()
    validation = watch.last
    if trainer.is_world_process_zero():
        export(
            model,
            setup.tokenizer,
            dest,
            provenance(recipe, setup),
            metrics=work / METRICS,
            plain=setup.family if recipe.to == "hf" else None,
            replace=recipe.overwrite,
        )
    loss = next(said["loss"] for said in reversed(trainer.state.log_history) if "loss" in said)
    padding = 1 - rows.used / (len(rows) * rows.length)
    return TrainReport(dest, plan.steps, plan.tokens, len(rows), padding, loss, validation, monotonic() - started)


class Evaluation(TrainerCallback):
    """Measures the validation loss every so often, and at the end."""

    def __init__(
        self,
        recipe: TrainRecipe,
        model: MobaForCausalLM,
        rows: Rows | None,
        metrics: Metrics,
        progress: Progress | None,
        log: Log | None,
    ) -> None:
        self.recipe, self.model, self.rows, self.metrics = recipe, model, rows, metrics
        self.progress, self.log = progress, log
        self.last: Losses | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measures where it is time to."""
        every = self.recipe.evaluate_every
        last = state.global_step == state.max_steps
        if self.rows is None or not (last or (every and state.global_step % every == 0)):
            return
        begin = monotonic()
        batch = args.per_device_train_batch_size
        self.last = evaluate(self.model, self.rows, batch, args.device, self.progress)
        self.metrics.pause(monotonic() - begin)
        said = {"step": state.global_step, "validation": asdict(self.last)}
        self.metrics.write(said)
        if self.log is not None:
            trailing = "" if self.last.trailing is None else f", trailing {self.last.trailing:.4f}"
            self.log(f"step {state.global_step}: validation loss {self.last.loss:.4f}{trailing}")


def provenance(recipe: TrainRecipe, setup: Setup) -> dict[str, Any]:
    """How the weights came about; no folder of this machine is in it."""
    asked = plain(recipe)
    for key in ("dest", "overwrite", "tokenizer"):
        del asked[key]
    for key in ("data", "validation"):
        if asked[key]:
            asked[key]["path"] = Path(asked[key]["path"]).name
    return {
        "trained_from": "random weights" if setup.random else Path(recipe.model).name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"mobazoo": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "recipe": {**asked, "model": Path(recipe.model).name},
    }


def _plan(recipe: TrainRecipe, setup: Setup) -> TrainPlan:
    steps = recipe.total_steps
    rows = steps * recipe.batch
    return TrainPlan(setup.parameters, steps, rows, rows * recipe.length, setup.random)


def _rows(recipe: TrainRecipe, setup: Setup, progress: Progress | None, validation: bool = False) -> Rows:
    data = recipe.validation if validation else recipe.data
    assert data is not None
    return Rows(tokenize(read_documents(data), setup.tokenizer, progress), recipe.length)
