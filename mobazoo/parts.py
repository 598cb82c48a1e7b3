"""Pieces of a long measurement, kept beside its result until that is whole, so that a second try goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mobazoo._version import __version__
from mobazoo.config.recipe import plain
from mobazoo.errors import InputError
from mobazoo.files import PARTS, beside, write_whole


class Parts:
    """What is measured already, by name.

    Pieces count only for the same recipe, weight files and version, and the same of whatever else ``about`` says.

    Args:
        dest: the result's file (None: nothing is kept).
        recipe: as resolved; where it goes (``dest``) does not matter.
        model: the checkpoint's folder or Hub id (None: there is none).
        about: what else the pieces depend on, by name.

    Raises:
        InputError: pieces of something else are there, or a file that holds none.
    """

    def __init__(
        self,
        dest: str | Path | None,
        recipe: Any,
        model: str | None = None,
        about: Mapping[str, str] | None = None,
    ) -> None:
        self._path = None
        self._kept: dict[str, Any] = {}
        if dest is None:
            return
        self._path = beside(Path(dest).expanduser(), PARTS)
        said = {key: value for key, value in plain(recipe).items() if key != "dest"}
        said |= {"mobazoo": __version__, **(about or {})}
        if model is not None:
            said["weights"] = _weights(model)
        self._of = json.loads(json.dumps(said))
        self._kept = self._read(self._path)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            said = json.loads(path.read_text("utf-8"))
            of, kept = dict(said["of"]), dict(said["parts"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: holds no parts of an interrupted measurement ({error!r}); remove it to begin anew"
            ) from None
        if other := differences(of, self._of):
            raise InputError(
                f"{path}: keeps what an interrupted run of something else measured ({other}); "
                "go on with the same, or remove it to begin anew"
            )
        return kept

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """A piece, measured only if it is not there; it comes back as JSON keeps it."""
        if name not in self._kept:
            self._kept[name] = json.loads(json.dumps(measure()))
            if self._path is not None:
                write_whole(self._path, json.dumps({"of": self._of, "parts": self._kept}))
        return self._kept[name]

    def done(self) -> None:
        """Forgets the pieces, once the result is written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first keys that differ, with both values.

    Example:
        >>> differences({"rounds": 3, "batch": 1}, {"rounds": 5, "batch": 1})
        'rounds: 3 there, 5 here'
    """
    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    return ", ".join(f"{key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys[:3])


def _weights(model: str) -> str:
    """A short digest of names, sizes and times of the weight files of a folder."""
    folder = Path(model).expanduser()
    files = [
        (path.name, status.st_size, status.st_mtime_ns)
        for path in sorted(folder.glob("*.safetensors"))
        for status in [path.stat()]
    ]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
