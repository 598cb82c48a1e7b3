"""The recipe of ``mobazoo run``: stages in order."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mobazoo.config.keys import refuse_unknown
from mobazoo.errors import InputError

_KEYS = ["verb", "recipe", "with"]
# Words that YAML reads as something else than text.
_NO_TEXT = ("true", "false", "yes", "no", "on", "off", "null", "y", "n", ".inf", ".nan")


@dataclass(frozen=True)
class Step:
    """One stage: a verb, its recipe, and ``key=value`` for it."""

    verb: str
    recipe: str
    overrides: tuple[str, ...]

    def command(self) -> str:
        """What somebody would type to do this stage alone."""
        return shlex.join(["mobazoo", self.verb, self.recipe, *(_bare(override) for override in self.overrides)])


def _bare(override: str) -> str:
    """``key=value`` without the quotes that JSON puts around a plain word, where YAML reads it as the same text."""
    return re.sub(r'^([^=]+)="([A-Za-z_./][\w./-]*)"$', _unquoted, override)


def _unquoted(match: re.Match[str]) -> str:
    key, word = match.groups()
    return match[0] if word.lower() in _NO_TEXT else f"{key}={word}"


@dataclass
class RunRecipe:
    """Stages, and the folder that keeps what is done.

    Attributes:
        folder: keeps the stamps of finished stages; ``{folder}`` in a stage's ``with`` stands for it.
        stages: ``{verb: convert, recipe: ..., with: {key: value}}`` each.
    """

    folder: str
    stages: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.folder.strip():  # as an unset shell variable leaves it: stages would write to /
            raise InputError("folder: is empty; want the run's folder, folder=runs/mine")
        if not self.stages:
            raise InputError("stages: none; want a list like [{verb: convert, recipe: ..., with: {...}}]")
        self.steps()

    def steps(self) -> list[Step]:
        """The stages, checked."""
        return [self._step(stage, f"stages[{i}]") for i, stage in enumerate(self.stages)]

    def _step(self, stage: Mapping[str, Any], key: str) -> Step:
        refuse_unknown(stage, _KEYS, key)
        for name in ("verb", "recipe"):
            if not isinstance(stage.get(name), str):
                raise InputError(f"{key}.{name}: want text, got {stage.get(name)!r}")
        said = stage.get("with") or {}
        if not isinstance(said, Mapping):
            raise InputError(f"{key}.with: want a mapping, got {said!r}")
        overrides = tuple(f"{name}={json.dumps(self._placed(value))}" for name, value in said.items())
        return Step(stage["verb"], self._placed(stage["recipe"]), overrides)

    def _placed(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{folder}", self.folder)
        if isinstance(value, Mapping):
            return {name: self._placed(item) for name, item in value.items()}
        return [self._placed(item) for item in value] if isinstance(value, list) else value
