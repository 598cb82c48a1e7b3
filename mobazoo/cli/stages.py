"""Stages of ``mobazoo run``: a stamp for each that is done, so that a second run goes on where the first ended."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobazoo._version import __version__
from mobazoo.cli.output import note
from mobazoo.cli.work import Outcome, Stage
from mobazoo.config.recipe import plain
from mobazoo.config.run import RunRecipe, Step
from mobazoo.errors import InputError, MobazooError
from mobazoo.files import NEW, OLD, PARTS, TRAINING, beside, read_stamp, signed, stage_of, write_whole

# What goes from beside a result when it is whole, by the verb that made it.
_LEFT_BY = {"train": (TRAINING,), "eval": (PARTS,), "bench": (PARTS,)}


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
        if said is None:
            return self._unstamped()
        if said["digest"] != self.digest:
            return None
        outcome = Outcome(said["line"], said["outputs"])
        return outcome if all(map(Path.exists, _places(outcome.outputs))) else None

    def _unstamped(self) -> Outcome | None:
        """Its result where it became whole and the run was killed before the stamp."""
        dest = getattr(self.recipe, "dest", None)
        if dest is None or stage_of(Path(dest).expanduser()) != self.digest:
            return None
        return Outcome(f"wrote {dest}, before the run was killed", [dest])

    def skip(self, outcome: Outcome) -> None:
        """Makes up for what a run that was killed after its result did not come to do: the stamp, and cleaning up."""
        if self.stamp.exists():
            return
        for dest in _places(outcome.outputs):
            for name in (NEW, OLD, *_LEFT_BY.get(self.step.verb, ())):
                _remove(beside(dest, name))
        self._write_stamp(outcome, None)

    def run(self) -> tuple[Outcome, float]:
        """Does it, stamps it, and says how many seconds it took."""
        self._clear()
        begin = time.perf_counter()
        with signed(self.digest):
            outcome = self.verb.execute(self.recipe)
        seconds = time.perf_counter() - begin
        self._write_stamp(outcome, seconds)
        return outcome, seconds

    def _write_stamp(self, outcome: Outcome, seconds: float | None) -> None:
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

    def _clear(self) -> None:
        """Removes what this stage wrote into the run's own folder when its recipe was another."""
        said, folder = read_stamp(self.stamp), self.stamp.parent.parent.resolve()
        if said is None:
            return
        for output in _places(said["outputs"]):
            if output.exists() and folder in output.resolve().parents:
                note(f"removing {output}, written by this stage with another recipe")
                _remove(output)
        self.stamp.unlink()


def _places(outputs: Iterable[str]) -> list[Path]:
    return [Path(output).expanduser() for output in outputs]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
        stamp = Path(recipe.folder, ".stages", f"{number:02}-{step.verb}.json").expanduser()
        stages.append(Planned(step, known[step.verb], resolved, digest, stamp))
    return stages
