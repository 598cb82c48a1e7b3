"""Checkpoints of a run: complete or not there, the newest complete one found, old ones removed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobazoo.checkpoint.folder import read_json
from mobazoo.checkpoint.manifest import MANIFEST, check_manifest
from mobazoo.checkpoint.staging import named_errors
from mobazoo.config.recipe import plain
from mobazoo.config.train import TrainRecipe
from mobazoo.errors import InputError
from mobazoo.parts import differences

STATE, TENSORS, TRAINER = "training.json", "training.safetensors", "trainer_state.json"
_NAME = re.compile(r"step-(\d{8,})")
# What may differ between a run and its continuation: nothing that the weights depend on.
_FREE = {
    "dest",
    "validation",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "keep",
    "resume",
    "to",
    "overwrite",
    "device",
    "micro_batch",
    "gradient_checkpointing",
    "compile",
    "shard",
    "tensorboard",
}


@dataclass(frozen=True, slots=True)
class Found:
    """The newest complete checkpoint (None: there is none), and why newer ones were skipped."""

    folder: Path | None
    skipped: tuple[str, ...] = ()


def name_of(step: int) -> str:
    """The folder of a checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Steps done at a checkpoint, by its folder's name (None: it is none)."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints(work: Path) -> list[Path]:
    """Folders of checkpoints, newest first; whether they are whole is not looked at."""
    if not work.is_dir():
        return []
    return sorted((path for path in work.iterdir() if step_of(path) is not None), key=lambda p: -(step_of(p) or 0))


def newest(work: Path) -> Found:
    """Looks from the newest backwards for a checkpoint whose every file has its sum.

    Raises:
        InputError: there are checkpoints, but none is complete. That is never taken for a fresh start.
    """
    skipped: list[str] = []
    for folder in checkpoints(work):
        problem = _problem(folder)
        if problem is None:
            return Found(folder, tuple(skipped))
        skipped.append(f"skipped {folder.name}: {problem}")
    if skipped:
        raise InputError(
            f"{work}: no checkpoint is complete ({'; '.join(skipped)}); begin anew with resume=false, "
            "which removes them"
        )
    return Found(None)


def _problem(folder: Path) -> str | None:
    try:
        if not (folder / MANIFEST).is_file():
            return "it has no manifest, so it was never finished"
        listed = read_json(folder / MANIFEST).get("files")
        for name, what in ((STATE, "state of the run"), (TENSORS, "state of the optimizer"), (TRAINER, "step count")):
            if not isinstance(listed, dict) or name not in listed or not (folder / name).is_file():
                return f"the {what} ({name}) is missing"
        check_manifest(folder)
    except InputError as error:
        return str(error).removeprefix(f"{folder}: ")
    return None


def identity(recipe: TrainRecipe) -> dict[str, Any]:
    """What of a recipe decides the weights."""
    return {key: value for key, value in plain(recipe).items() if key not in _FREE}


def check_identity(folder: Path, recipe: TrainRecipe) -> None:
    """Compares a checkpoint's recipe with the run's.

    Raises:
        InputError: the first keys that differ, with both values.
    """
    there, here = read_json(folder / STATE).get("recipe") or {}, identity(recipe)
    if said := differences(there, here):
        raise InputError(
            f"{folder}: is of another recipe ({said}); begin anew with resume=false, which removes "
            f"it, or, if it is a model, take its weights alone with model={folder} and another dest"
        )


def prune(work: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints."""
    for folder in checkpoints(work)[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def clear(work: Path) -> None:
    """Removes all checkpoints."""
    prune(work, 0)


@contextmanager
def owned(work: Path) -> Iterator[None]:
    """The folder of a run for this process alone; what killed saves left in it is removed.

    Raises:
        InputError: another process has it.
    """
    with named_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{work}: another process trains there; wait for it, or choose another dest") from None
        for left in work.glob(".step-*.mobazoo-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(handle)
