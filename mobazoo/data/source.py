"""What a ``Data`` source is made of: documents, and the files they are in."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobazoo.config.data import STDLIB, Data
from mobazoo.errors import InputError

_PATTERNS = {"text": "**/*.txt", "jsonl": "**/*.jsonl", "parquet": "**/*.parquet"}
# Installed packages are not the standard library, and tests are text of another kind.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Document:
    """One text, or one chat.

    Attributes:
        name: unique in its source: the path below the folder, ``path:line`` for rows of a file.
        text: what to learn; empty for a chat.
        messages: ``{role, content}`` each; empty for a text.
    """

    name: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()


def find_files(data: Data) -> list[tuple[str, Path]]:
    """Name and place of every file of the source, sorted by name.

    Raises:
        InputError: nothing there.
    """
    library = data.path == STDLIB
    root = Path(sysconfig.get_path("stdlib")) if library else Path(data.path).expanduser()
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise InputError(f"data.path: {data.path}: no such file or folder; `{STDLIB}` needs none")
    globs = data.files or ["**/*.py" if library else _PATTERNS[data.format]]
    places = {path for pattern in globs for path in _glob(root, pattern) if path.is_file()}
    found = sorted((path.relative_to(root).as_posix(), path) for path in places)
    if library:
        found = [(name, path) for name, path in found if not _NOT_LIBRARY & set(name.split("/"))]
    if not found:
        raise InputError(f"data.files: nothing in {data.path} matches {', '.join(globs)}")
    return found


def _glob(root: Path, pattern: str) -> list[Path]:
    try:
        return list(root.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"data.files: {pattern!r} is no pattern below a folder: {error}") from None
