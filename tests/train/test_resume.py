"""A run that was stopped, killed or damaged goes on as if nothing had happened, or says why it cannot."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from mobazoo.checkpoint import staging
from mobazoo.checkpoint.folder import read_json
from mobazoo.config.train import Stage, TrainRecipe
from mobazoo.errors import InputError, Stopped
from mobazoo.train import engine, train
from mobazoo.train.checkpoints import checkpoints, newest, owned

from .conftest import HELD_OUT, metrics, small

Make = Callable[..., TrainRecipe]
STAGES = [Stage(RULES := [{"pattern": "moba", "block_size": 8, "top_k": 2}], 0.7), Stage([{"pattern": "full"}])]


SAVING: dict[str, Any] = {"steps": 6, "checkpoint_every": 2, "log_every": 3, "schedule": STAGES}


@pytest.fixture
def saving(recipe: Make) -> Make:
    """Six steps with a checkpoint every two and a change of attention after the fourth."""
    return lambda **fields: recipe(**{**SAVING, **fields})


def timeless(dest: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in metrics(dest)]


def same(one: Path, two: Path) -> bool:
    a, b = (load_file(path / "model.safetensors") for path in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch, rank: int | None = None) -> None:
    """As if SIGTERM came during that step, to one process or to all."""
    real = engine.Saver.on_step_end

    def on_step_end(self: engine.Saver, args: Any, state: TrainerState, control: Any, **given: Any) -> None:
        if state.global_step == step and rank in (None, args.process_index):
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, args, state, control, **given)

    monkeypatch.setattr(engine.Saver, "on_step_end", on_step_end)


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(
    saving: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"steps": 12, "checkpoint_every": 4, "validation": HELD_OUT, "evaluate_every": 4}
    train(saving(**fields, dest=str(tmp_path / "whole")))
    before = signal.getsignal(signal.SIGTERM)
    made = saving(**fields)
    for step in (6, 9):
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            with pytest.raises(Stopped, match=rf"stopped by SIGTERM after step {step} of 12; the same command goes on"):
                train(made)
    assert signal.getsignal(signal.SIGTERM) == before
    said: list[str] = []
    train(made, log=said.append)
    assert any("resuming from" in line and "after step 9 of 12" in line for line in said)
    configs = [read_json(tmp_path / name / "config.json")["moba"] for name in ("out", "whole")]
    assert configs[0] == configs[1]
    assert same(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out.training").exists()
    whole = timeless(tmp_path / "whole")
    both = [line for line in timeless(tmp_path / "out") if line["step"] in (4, 8, 12)]  # where both end a line
    assert both == [line for line in whole if line["step"] in (4, 8, 12)]


def killed(made: TrainRecipe, after: float) -> bool:
    """Runs it in a child that is killed after so many seconds; whether it was still running."""
    child = os.fork()
    if child == 0:
        try:
            train(made)
        finally:
            os._exit(0)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_sigkill_at_random_points_loses_no_more_than_the_last_steps(
    saving: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    fields = {"steps": 8, "checkpoint_every": 1, "keep": 3}
    whole = saving(**fields, dest=str(tmp_path / "whole"))
    begin = time.monotonic()
    train(whole)
    seconds = time.monotonic() - begin
    chance = random.Random(7)
    made = saving(**fields)
    kills = sum(killed(made, seconds * chance.uniform(0.4, 0.9)) for _ in range(4))
    assert kills > 0
    if not (tmp_path / "out").exists():  # the last one may have come to the end before it was killed
        train(made)
    assert same(tmp_path / "out", tmp_path / "whole")
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


class Kill(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("place", ["write_state", "write_manifest", "_sync", "_swap"])
def test_a_kill_during_a_save_leaves_the_older_checkpoint(
    place: str, saving: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = staging if place.startswith("_") else engine
    real, calls = getattr(module, place), 0

    def die(*args: Any, **given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Kill
        return real(*args, **given)

    monkeypatch.setattr(module, place, die)
    monkeypatch.setattr(staging.shutil, "rmtree", lambda *args, **given: None)  # a killed process cleans nothing up
    with pytest.raises(Kill):
        train(saving())
    monkeypatch.undo()
    monkeypatch.setattr(staging, "_sync_one", lambda path: None)
    work = tmp_path / "out.training"
    assert list(work.glob(".step-00000004.*"))
    assert newest(work).folder == work / "step-00000002"
    said: list[str] = []
    train(saving(), log=said.append)
    assert any("after step 2 of 6" in line for line in said)


@pytest.fixture(scope="session")
def stopped_once(tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            train(small(tokenizer, folder, **SAVING))
    return folder / "out.training"


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A run with checkpoints after steps 2 and 3."""
    shutil.copytree(stopped_once, tmp_path / "out.training")
    assert [path.name for path in checkpoints(tmp_path / "out.training")] == ["step-00000003", "step-00000002"]
    return tmp_path / "out.training"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: flip(f / "model.safetensors"), "changed since it was written: model.safetensors"),
    (lambda f: flip(f / "training.safetensors"), "changed since it was written: training.safetensors"),
    (lambda f: os.truncate(f / "model.safetensors", 900), "changed since it was written: model.safetensors"),
    (
        lambda f: (f / "training.safetensors").unlink(),
        r"the state of the optimizer \(.*\) is missing",
    ),
    (lambda f: (f / "training.json").unlink(), r"the state of the run \(training.json\) is missing"),
    (lambda f: (f / "trainer_state.json").unlink(), r"the step count \(trainer_state.json\) is missing"),
    (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    (lambda f: (f / "mobazoo.manifest.json").unlink(), "it has no manifest, so it was never finished"),
    (lambda f: (f / "mobazoo.manifest.json").write_text("{"), "not JSON"),
    (lambda f: shutil.rmtree(f) or f.mkdir(), "it has no manifest, so it was never finished"),
]


@pytest.mark.parametrize("damage, why", DAMAGE, ids=[why[:40] for _, why in DAMAGE])
def test_a_damaged_checkpoint_is_skipped_by_name(damage: Callable[[Path], object], why: str, stopped: Path) -> None:
    damage(stopped / "step-00000003")
    found = newest(stopped)
    assert found.folder == stopped / "step-00000002"
    (line,) = found.skipped
    assert line.startswith("skipped step-00000003: ")
    damage(stopped / "step-00000002")
    with pytest.raises(InputError, match=rf"no checkpoint is complete \(skipped step-00000003: .*{why}.*resume=false"):
        newest(stopped)


def test_no_complete_checkpoint_is_no_fresh_start(stopped: Path, saving: Make) -> None:
    (stopped / "step-00000003" / "training.safetensors").unlink()
    shutil.copytree(stopped, stopped.with_name("other.training"))
    said: list[str] = []
    train(saving(dest=str(stopped.with_name("other"))), log=said.append)
    skipped = "skipped step-00000003: the state of the optimizer (training.safetensors) is missing"
    assert said.index(skipped) + 1 == next(i for i, line in enumerate(said) if "after step 2 of 6" in line)
    (stopped / "step-00000002" / "training.safetensors").unlink()
    with pytest.raises(InputError, match="no checkpoint is complete"):
        train(saving())
    train(saving(resume=False, steps=5))


def test_the_optimizer_state_of_every_weight_must_be_there(stopped: Path, saving: Make) -> None:
    tensors = load_file(stopped / "step-00000003" / "training.safetensors")
    gone = "optimizer.exp_avg/model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, stopped / "step-00000003" / "training.safetensors")
    (stopped / "step-00000003" / "mobazoo.manifest.json").unlink()
    engine.write_manifest(stopped / "step-00000003")
    with pytest.raises(InputError, match=r"has no whole optimizer state of model.layers.1.mlp.up_proj.weight"):
        train(saving())


def test_another_recipe_does_not_go_on(stopped: Path, saving: Make) -> None:
    with pytest.raises(InputError, match=r"is of another recipe \(learning_rate: 0.01 there, 0.02 here\); begin anew"):
        train(saving(learning_rate=0.02))
    train(saving(learning_rate=0.02, resume=False))


def test_a_full_disk_stops_the_run_and_keeps_what_is_there(
    saving: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = engine.write_state, 0

    def full(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.ENOSPC, "no space left on device")
        real(*args)

    monkeypatch.setattr(engine, "write_state", full)
    with pytest.raises(InputError, match="step-00000004: disk full; nothing was changed; free some space"):
        train(saving())
    assert [path.name for path in checkpoints(tmp_path / "out.training")] == ["step-00000002"]
    train(saving())


def test_the_last_ones_are_kept(saving: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(5, monkeypatch)
    with pytest.raises(Stopped):
        train(saving(keep=2))
    names = [path.name for path in checkpoints(tmp_path / "out.training")]
    assert names == ["step-00000005", "step-00000004"]


def test_nan_names_the_last_good_checkpoint(saving: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.Runner.training_step

    def training_step(self: engine.Runner, *args: Any, **given: Any) -> torch.Tensor:
        loss = real(self, *args, **given)
        if self.state.global_step == 3:
            next(self.model.parameters()).grad[0, 0] = float("inf")  # type: ignore[index, union-attr]
        return loss

    monkeypatch.setattr(engine.Runner, "training_step", training_step)
    with pytest.raises(InputError, match=r"not finite at step 4, .*; the last good checkpoint is .*step-00000002;"):
        train(saving())
    assert not (tmp_path / "out").exists()


def test_one_run_at_a_time(saving: Make, tmp_path: Path) -> None:
    with (
        owned(tmp_path / "out.training"),
        pytest.raises(InputError, match="another process trains there; wait for it"),
    ):
        train(saving())
