"""Stages of attention over a run, switched exactly between two steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mobazoo.attention.pattern import Full
from mobazoo.config.rules import LayerAttention, parse_rules, resolve
from mobazoo.config.train import TrainRecipe
from mobazoo.errors import UnsupportedError
from mobazoo.nn.causal_lm import MobaForCausalLM

Rules = list[dict[str, Any]]


class AttentionSchedule:
    """Which rules hold at which step. A function of the step alone, so resuming needs no state.

    Args:
        recipe: of the run.
        base: the rules that the stages' are applied after.
        layers: of the model.

    Raises:
        InputError: rules that do not resolve.
        UnsupportedError: a stage that would add or remove a key convolution, which has weights.
    """

    def __init__(self, recipe: TrainRecipe, base: Sequence[Mapping[str, Any]], layers: int) -> None:
        own: Rules = [dict(rule) for rule in base]
        self.ends = recipe.ends or (recipe.total_steps,)
        self.rules: list[Rules] = [[*own, *map(dict, stage.attention)] for stage in recipe.schedule] or [own]
        self.layers = [
            resolve(parse_rules(rules), layers, f"train.schedule[{i}].attention") for i, rules in enumerate(self.rules)
        ]
        first = [layer.kconv for layer in resolve(parse_rules(own), layers)]
        for i, stage in enumerate(self.layers):
            if [layer.kconv for layer in stage] != first:
                raise UnsupportedError(
                    f"train.schedule[{i}].attention: kconv has weights, so a stage cannot add or remove it; set it in "
                    "attention, for the whole run"
                )

    def stage(self, step: int) -> int:
        """The stage of a step, counted from 0; the last one after the end."""
        return min(bisect_right(self.ends, step), len(self.ends) - 1)

    @property
    def ends_plain(self) -> bool:
        """Whether the run ends with full attention and no key convolution in every layer."""
        return all(layer.pattern == Full() and not layer.kconv for layer in self.layers[-1])


class Switch(TrainerCallback):
    """Gives the model the attention of the step that comes.

    Args:
        schedule: what holds when.
        model: to switch.
        said: told the stage and its number of layers' patterns when one begins.
    """

    def __init__(self, schedule: AttentionSchedule, model: MobaForCausalLM, said: Callable[[int, int], None]) -> None:
        self.schedule, self.model, self.said = schedule, model, said
        self.now: int | None = None

    @property
    def layers(self) -> tuple[LayerAttention, ...]:
        """What holds now."""
        return self.schedule.layers[self.now or 0]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Sets the stage that the run begins or goes on in."""
        self._set(state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Switches where a stage begins."""
        self._set(state.global_step)

    def _set(self, step: int) -> None:
        stage = self.schedule.stage(step)
        if stage != self.now:
            self.model.set_attention(self.schedule.rules[stage])
            self.now = stage
            self.said(stage, step)
