"""What a run says of itself, in the log and in ``metrics.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mobazoo.attention.pattern import Full
from mobazoo.config.rules import LayerAttention
from mobazoo.config.train import TrainRecipe
from mobazoo.data.rows import Rows
from mobazoo.explain import keys_read

Log = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def share_of_keys(layers: Sequence[LayerAttention], rows: Rows) -> float:
    """Share of the keys full attention would read that these layers read in a pass over ``rows``, mean over layers."""
    sizes: dict[int, int] = {}
    for row in rows.plan:
        for _, size in row:
            sizes[size] = sizes.get(size, 0) + 1
    full = sum(keys_read(Full(), size) * times for size, times in sizes.items())
    patterns = [layer.pattern for layer in layers]
    read = {p: sum(keys_read(p, size) * times for size, times in sizes.items()) for p in set(patterns)}
    return sum(read[pattern] for pattern in patterns) / (len(patterns) * full)


class Metrics(TrainerCallback):
    """Writes a line of ``metrics.jsonl`` for each line of the log, and moves the bar.

    Args:
        recipe: of the run.
        file: to write to.
        share: gives the share of keys read now.
        progress: told ``("train", steps done, steps)``.
        log: told each line for people.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        file: Path,
        share: Callable[[], float],
        progress: Progress | None,
        log: Log | None,
    ) -> None:
        self.recipe, self.file, self.share = recipe, file, share
        self.progress, self.log = progress, log
        self.since, self.step = time.perf_counter(), 0
        self.loss = float("nan")

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
        if logs is None or "loss" not in logs:
            return
        self.loss = logs["loss"]
        if not state.is_world_process_zero:
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
        self.write(said)
        if self.log is not None:
            self.log(
                f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}, "
                f"{rate:,.0f} tokens/s, learning rate {logs['learning_rate']:.2e}"
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
        self.file.write_text("".join(kept), "utf-8")

    def write(self, said: dict[str, Any]) -> None:
        """Adds a line to the file."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(said) + "\n")

    def pause(self, seconds: float) -> None:
        """Leaves time that was not spent on training out of the rate."""
        self.since += seconds
