"""Pieces of a long measurement, kept beside its result until that is whole, so that a second try goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mobazoo._version import __version__
from mobazoo.config.recipe import plain
from mobazoo.files import write_whole


class Parts:
    """What is measured already, by name.

    Pieces count only for the same recipe, the same weight files and the same version; others are measured again.

    Args:
        dest: the result's file (None: nothing is kept).
        recipe: as resolved.
        model: the checkpoint's folder or Hub id.
    """

    def __init__(self, dest: str | Path | None, recipe: Any, model: str) -> None:
        self._path = None
        self._kept: dict[str, Any] = {}
        if dest is None:
            return
        path = Path(dest).expanduser()
        self._path = path.with_name(f".{path.name}.parts")
        self._digest = _digest(recipe, model)
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(self._path.read_text("utf-8"))
            if said["digest"] == self._digest:
                self._kept = dict(said["parts"])

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """A piece, measured only if it is not there; it comes back as JSON keeps it."""
        if name not in self._kept:
            self._kept[name] = json.loads(json.dumps(measure()))
            if self._path is not None:
                write_whole(self._path, json.dumps({"digest": self._digest, "parts": self._kept}))
        return self._kept[name]

    def done(self) -> None:
        """Forgets the pieces, once the result is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _digest(recipe: Any, model: str) -> str:
    folder = Path(model).expanduser()
    weights = [
        (path.name, status.st_size, status.st_mtime_ns)
        for path in sorted(folder.glob("*.safetensors"))
        for status in [path.stat()]
    ]
    return hashlib.sha256(json.dumps([__version__, plain(recipe), weights], sort_keys=True).encode()).hexdigest()
