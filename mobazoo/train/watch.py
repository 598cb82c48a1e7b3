"""The validation loss during a run."""

from __future__ import annotations

from dataclasses import asdict
from time import monotonic
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mobazoo.config.train import TrainRecipe
from mobazoo.data.rows import Rows
from mobazoo.data.tokens import Progress
from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.train.evaluate import Losses, evaluate
from mobazoo.train.metrics import Log, Metrics


class Evaluation(TrainerCallback):
    """Measures the validation loss every so often, and at the end."""

    def __init__(
        self,
        recipe: TrainRecipe,
        model: MobaForCausalLM,
        rows: Rows | None,
        metrics: Metrics,
        progress: Progress | None,
        log: Log,
    ) -> None:
        self.recipe, self.model, self.rows, self.metrics = recipe, model, rows, metrics
        self.progress, self.log = progress, log
        self.last: Losses | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measures where it is time to."""
        every = self.recipe.evaluate_every
        last = state.global_step == state.max_steps
        if self.rows is not None and (last or (every and state.global_step % every == 0)):
            self.measure(args, state.global_step)

    def measure(self, args: TrainingArguments, step: int) -> None:
        """Measures now."""
        assert self.rows is not None
        begin = monotonic()
        batch, rank, world = args.per_device_train_batch_size, args.process_index, args.world_size
        self.last = evaluate(self.model, self.rows, batch, args.device, self.progress, rank, world)
        self.metrics.pause(monotonic() - begin)
        if rank == 0:
            self.metrics.write({"step": step, "validation": asdict(self.last)})
        trailing = "" if self.last.trailing is None else f", trailing {self.last.trailing:.4f}"
        places = ", ".join(f"{where} {loss:.4f}" for where, loss in self.last.by_position.items())
        self.log(f"step {step}: validation loss {self.last.loss:.4f}{trailing}; by position {places}")
