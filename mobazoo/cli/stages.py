"""Stages of ``mobazoo run``: a stamp for each that is done, so that a second run goes on where the first ended."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobazoo._version import __version__
from mobazoo.cli.output import note
from mobazoo.cli.work import Outcome, Stage
from mobazoo.config.recipe import plain
from mobazoo.config.run import RunRecipe, Step
from mobazoo.errors import InputError, MobazooError
from mobazoo.files import read_stamp, write_whole


@dataclass(frozen=True)
class Planned:
    """A stage ready to run.

    Attributes:
        step: as the recipe says it.
        verb: the module that does it.
        recipe: its own recipe, resolved.
        digest: of that recipe and of all stages before it.
        stamp: the file that says it is done.
    """

    step: Step
    verb: Stage
    recipe: Any
    digest: str
    stamp: Path

    def done(self) -> Outcome | None:
        """What it left when it was done before with this recipe, if that is still there."""
        said = read_stamp(self.stamp)
        if said is None or said["digest"] != self.digest:
            return None
        outcome = Outcome(said["line"], said["outputs"])
        return outcome if all(Path(output).exists() for output in outcome.outputs) else None

    def run(self) -> tuple[Outcome, float]:
        """Does it, stamps it, and says how many seconds it took."""
        self._clear()
        begin = time.perf_counter()
        outcome = self.verb.execute(self.recipe)
        seconds = time.perf_counter() - begin
        said = {
            "digest": self.digest,
            "verb": self.step.verb,
            "command": self.step.command(),
            "recipe": plain(self.recipe),
            "line": outcome.line,
            "outputs": outcome.outputs,
            "seconds": seconds,
            "mobazoo": __version__,
        }
        write_whole(self.stamp, json.dumps(said, indent=1) + "\n")
        return outcome, seconds

    def _clear(self) -> None:
        """Removes what this stage wrote into the run's own folder when its recipe was another."""
        said, folder = read_stamp(self.stamp), self.stamp.parent.parent.resolve()
        if said is None:
            return
        for output in map(Path, said["outputs"]):
            if output.exists() and folder in output.resolve().parents:
                note(f"removing {output}, written by this stage with another recipe")
                shutil.rmtree(output) if output.is_dir() and not output.is_symlink() else output.unlink()
        self.stamp.unlink()


def planned(recipe: RunRecipe, verbs: Mapping[str, Any]) -> list[Planned]:
    """Every stage with its recipe resolved, before anything runs.

    Raises:
        InputError: a verb that is none, or anything wrong in a stage's recipe, with the stage's number.
        UnsupportedError: a library that a stage needs is not here.
    """
    known = {name: verb for name, verb in verbs.items() if hasattr(verb, "execute")}
    stages, digest = [], ""
    for number, step in enumerate(recipe.steps(), 1):
        if step.verb not in known:
            raise InputError(f"stage {number}: {step.verb!r} is no stage; want one of {', '.join(known)}")
        try:
            resolved = known[step.verb].resolve(step.recipe, step.overrides)
        except MobazooError as error:
            raise type(error)(f"stage {number} ({step.verb}): {error}") from None
        said = json.dumps([digest, step.verb, plain(resolved)], sort_keys=True)
        digest = hashlib.sha256(said.encode()).hexdigest()
        stamp = Path(recipe.folder, ".stages", f"{number:02}-{step.verb}.json")
        stages.append(Planned(step, known[step.verb], resolved, digest, stamp))
    return stages
