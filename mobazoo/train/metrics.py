"""What a run says of itself, in the log and in ``metrics.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mobazoo.checkpoint.staging import named_errors
from mobazoo.config.train import TrainRecipe
from mobazoo.data.tokens import Progress
from mobazoo.files import write_whole

Log = Callable[[str], None]


class Metrics(TrainerCallback):
    """Writes a line of ``metrics.jsonl`` for each line of the log, and moves the bar.

    Args:
        recipe: of the run.
        file: to write to.
        share: gives the share of keys read now.
        mfu: gives the share of the device's peak that so many tokens per second use (None: not known).
        progress: told ``("train", steps done, steps)``.
        log: told each line for people.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        file: Path,
        share: Callable[[], float],
        mfu: Callable[[float], float | None],
        progress: Progress | None,
        log: Log | None,
    ) -> None:
        self.recipe, self.file, self.share, self.mfu = recipe, file, share, mfu
        self.progress, self.log = progress, log
        self.since, self.step = time.perf_counter(), 0
        self.board = _board(file.parent.with_suffix(".tensorboard")) if recipe.tensorboard else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the clock."""
        self.since, self.step = time.perf_counter(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves the bar."""
        if self.progress is not None and state.is_world_process_zero:
            self.progress("train", state.global_step, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Writes a line, where transformers logs a loss."""
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        now, per_step = time.perf_counter(), self.recipe.batch * self.recipe.length
        rate = (state.global_step - self.step) * per_step / max(now - self.since, 1e-9)
        self.since, self.step = now, state.global_step
        said = {
            "step": state.global_step,
            "tokens": state.global_step * per_step,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens_per_second": round(rate, 1),
            "keys_read": round(self.share(), 6),
        }
        used = self.mfu(rate)
        if used is not None:
            said["mfu"] = round(used, 4)
        self.write(said)
        if self.board is not None:
            for name, value in said.items():
                if value is not None:
                    self.board.add_scalar(f"train/{name}", value, state.global_step)
            self.board.flush()  # a run may be killed at any time
        if self.log is not None:
            of_peak = "" if used is None else f", {said['mfu']:.1%} of the device's peak"
            self.log(
                f"step {state.global_step} of {state.max_steps}: loss {said['loss']:.4f}, "
                f"{said['tokens_per_second']:,.0f} tokens/s{of_peak}, {said['keys_read']:.1%} of the keys read, "
                f"learning rate {said['learning_rate']:.2e}"
            )

    def rewind(self, step: int) -> None:
        """Drops what was written after ``step``, which will be written again."""
        kept = []
        if step and self.file.exists():
            for line in self.file.read_text("utf-8").splitlines(keepends=True):
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except ValueError:  # torn by a kill; nothing whole comes after it
                    break
        write_whole(self.file, "".join(kept))

    def write(self, said: dict[str, Any]) -> None:
        """Adds a line to the file.

        Raises:
            InputError: it cannot be written, as when the disk is full.
        """
        with named_errors(self.file), self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(said) + "\n")
        if self.board is not None and "validation" in said:
            found = said["validation"]
            by_position = {f"by_position/{where}": loss for where, loss in found["by_position"].items()}
            for name, value in {"loss": found["loss"], "trailing": found["trailing"], **by_position}.items():
                if value is not None:
                    self.board.add_scalar(f"validation/{name}", value, said["step"])
            self.board.flush()

    def pause(self, seconds: float) -> None:
        """Leaves time that was not spent on training out of the rate."""
        self.since += seconds


def _board(folder: Path) -> Any:
    return import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
