"""Small files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mobazoo.errors import InputError

RESULT = "mobazoo"  # the key that tells a result from any other JSON file
STAGE = "stage"  # the key that says which stage of a run wrote a result
MARK = ".mobazoo-stage"  # the file that says it of a folder
# What stands beside a place while it is being filled: a new and an old folder, a training, parts of a measurement.
NEW, OLD, TRAINING, PARTS = ".{}.mobazoo-new", ".{}.mobazoo-old", "{}.training", ".{}.parts"
_STAMP = {"digest", "verb", "command", "recipe", "line", "outputs", "seconds"}
_STAGE: ContextVar[str | None] = ContextVar("stage", default=None)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file beside its place and renames it when it is on disk.

    Raises:
        InputError: a place that cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror}; give another dest") from None


def beside(path: Path, name: str) -> Path:
    """``NEW``, ``OLD``, ``TRAINING`` or ``PARTS`` of a place."""
    return path.with_name(name.format(path.name))


def read_stamp(path: Path) -> dict[str, Any] | None:
    """What a finished stage of ``mobazoo run`` left; None where there is no such file.

    Raises:
        InputError: a file that is no stamp.
    """
    try:
        said = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a stamp ({error}); remove it; a stage that is not whole runs again") from None
    if not isinstance(said, Mapping) or not said.keys() >= _STAMP:
        raise InputError(f"{path}: not a stamp of this version; remove it; a stage that is not whole runs again")
    return dict(said)


@contextmanager
def signed(stage: str) -> Iterator[None]:
    """Folders and results that are written inside say which stage of a run they are, before they get their names.

    A run that is killed before its stamp is there then knows its own result again, and no other.
    """
    token = _STAGE.set(stage)
    try:
        yield
    finally:
        _STAGE.reset(token)


def signature() -> str | None:
    """The stage that is writing; None outside of ``mobazoo run``."""
    return _STAGE.get()


def stage_of(path: Path) -> str | None:
    """The stage that wrote a folder or a JSON result; None where none did or nothing is there."""
    try:
        if path.is_dir():
            return (path / MARK).read_text("utf-8")
        said = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return said.get(STAGE) if isinstance(said, dict) else None


def check_writable(path: Path) -> None:
    """Refuses a file that could not be written when its content is there, perhaps after hours.

    Raises:
        InputError: a folder of that name, or no folder that files can be written to.
    """
    try:
        above, folder = next(parent for parent in path.absolute().parents if parent.exists()), path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise InputError(f"{path}: cannot be written: {error.strerror}; give another dest") from None
    if folder:
        raise InputError(f"{path}: is a folder; give the file to write")
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{path}: cannot be written: {above} is no folder that takes files; give another dest")


def check_place(path: Path, is_earlier: Callable[[str], bool]) -> None:
    """Refuses a place that holds something else than an earlier file of the kind, or can hold none.

    Args:
        path: to be written.
        is_earlier: says of a text whether a file of the kind holds it; may raise ``ValueError`` where it cannot tell.

    Raises:
        InputError: a folder, another file, or as ``check_writable``.
    """
    check_writable(path)
    if not path.exists():
        return
    try:
        earlier = is_earlier(path.read_text("utf-8"))
    except (OSError, ValueError):
        earlier = False
    if not earlier:
        raise InputError(f"{path}: exists and is no earlier result, so it is not replaced; choose another dest")


def check_result_place(dest: str | Path | None, keys: Collection[str] = (RESULT,)) -> None:
    """``check_place`` of a JSON result, which has these keys; None is no place and fine."""
    if dest is not None:
        check_place(Path(dest).expanduser(), lambda text: _keys(json.loads(text)) >= set(keys))


def _keys(said: Any) -> set[str]:
    return set(said) if isinstance(said, Mapping) else set()
