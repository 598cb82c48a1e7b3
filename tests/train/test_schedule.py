"""Attention that changes during a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mobazoo
from mobazoo.attention.pattern import Full, MoBA
from mobazoo.config.train import Stage, TrainRecipe
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.nn.attention import Attention
from mobazoo.train import engine, plan_train, train
from mobazoo.train.schedule import AttentionSchedule

from .conftest import metrics

Make = Callable[..., TrainRecipe]
MOBA: list[dict[str, Any]] = [{"layers": ":", "pattern": "moba", "block_size": 8, "top_k": 2}]
FULL: list[dict[str, Any]] = [{"layers": ":", "pattern": "full"}]


def test_switching_is_exact_at_the_step(recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[int, type]] = []
    real = engine.Runner.training_step

    def training_step(self: engine.Runner, model: torch.nn.Module, *args: Any, **given: Any) -> torch.Tensor:
        (kind,) = {type(m.layer.pattern) for m in model.modules() if isinstance(m, Attention)}
        seen.append((self.state.global_step, kind))
        return real(self, model, *args, **given)

    monkeypatch.setattr(engine.Runner, "training_step", training_step)
    said: list[str] = []
    made = recipe(steps=10, micro_batch=2, schedule=[Stage(MOBA, 0.9), Stage(FULL)])
    train(made, log=said.append)
    assert seen == [(step, MoBA if step < 9 else Full) for step in range(10) for _ in range(2)]
    assert [line for line in said if "attention stage" in line] == [
        "step 1: attention stage 1 of 2: layers 0-1: MoBA(block_size=8, top_k=2)",
        "step 10: attention stage 2 of 2: layers 0-1: Full()",
    ]
    assert [line["keys_read"] == 1 for line in metrics(tmp_path / "out")] == [False] * 9 + [True]
    model = mobazoo.load(tmp_path / "out")
    assert all(layer.pattern == Full() for layer in model.config.attention_layers())


def test_the_first_stage_learns_what_a_run_without_a_second_does(recipe: Make, tmp_path: Path) -> None:
    losses = []
    for stages in ([], [Stage(FULL, 0.5), Stage(MOBA)]):
        train(recipe(attention=FULL, steps=8, decay="constant", schedule=stages, overwrite=True))
        losses.append([line["loss"] for line in metrics(tmp_path / "out")])
    assert losses[0][:4] == losses[1][:4]
    assert all(a != b for a, b in zip(losses[0][4:], losses[1][4:], strict=True))


def test_a_compiled_run_switches(recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Graphs are traced and run as they are; what torch's compiler makes of them is tests/models/test_inductor.py."""
    stages = [Stage(MOBA, 0.5), Stage(FULL)]
    train(recipe(schedule=stages, dest=str(tmp_path / "plain")))
    monkeypatch.setattr(engine, "TrainingArguments", partial(engine.TrainingArguments, torch_compile_backend="eager"))
    torch.compiler.reset()  # another test's graphs would be taken
    torch._dynamo.utils.counters.clear()
    train(recipe(schedule=stages, compile=True, dest=str(tmp_path / "whole")))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # one for each stage
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("plain", "whole")]
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-4, rtol=1e-4)
    assert [line["keys_read"] == 1 for line in metrics(tmp_path / "whole")] == [False, False, True, True]


def test_ends_by_share_and_by_tokens(recipe: Make) -> None:
    made = recipe(steps=20, schedule=[Stage(MOBA, 0.25), Stage(FULL, 4 * 64 * 12), Stage(MOBA)])
    schedule = AttentionSchedule(made, [], 2)
    assert made.ends == (5, 12, 20)
    assert [schedule.stage(step) for step in (0, 4, 5, 11, 12, 19, 20)] == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "stages, message",
    [
        ([Stage(MOBA), Stage(FULL)], r"train.schedule\[0\].until: missing; only the last stage may leave it out"),
        (
            [Stage(MOBA, 0.5), Stage(FULL, 0.5)],
            r"train.schedule\[1\].until: 0.5 ends before step 3",
        ),
        ([Stage(MOBA, 0.5)], r"train.schedule: ends after step 2, and the run after step 4; leave out"),
        ([Stage(MOBA, 10**9)], r"train.schedule: ends after step \d+, and the run after step 4"),
        ([Stage([{"pattern": "none"}])], r"train.schedule\[0\].attention\[0\].pattern: want one of full, moba"),
        (
            [Stage([{"layers": 9, "pattern": "full"}])],
            r"attention\[.\].layers: layer 9 is not there",
        ),
    ],
)
def test_bad_schedules_are_named(stages: list[Stage], message: str, recipe: Make) -> None:
    with pytest.raises(InputError, match=message):
        plan_train(recipe(schedule=stages))


def test_a_stage_cannot_add_weights(recipe: Make) -> None:
    with pytest.raises(UnsupportedError, match=r"train.schedule\[0\].attention: kconv has weights"):
        plan_train(recipe(schedule=[Stage([{"kconv": 3}])]))
    plan_train(recipe(attention=[{"kconv": 3}], schedule=[Stage(MOBA, 0.5), Stage(FULL)]))
