"""Documents of a ``Data`` source, in an order that depends on their names only."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
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


def read_documents(data: Data) -> Iterator[Document]:
    """Every document of the source's split, one at a time.

    Raises:
        InputError: no such path, no such file below it, or a file that is not what ``format`` says.
    """
    data.check()
    yield from islice(_kept(data), data.max_documents)


def share_of(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, on any machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def in_split(name: str, data: Data) -> bool:
    """Whether the document called ``name`` belongs to ``data.split``."""
    return data.split == "all" or (share_of(name) < data.validation) == (data.split == "validation")


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


def _kept(data: Data) -> Iterator[Document]:
    for document in _all(data):
        long_enough = bool(document.messages) or len(document.text) >= max(data.min_chars, 1)
        if long_enough and in_split(document.name, data):
            yield document


def _all(data: Data) -> Iterator[Document]:
    if data.format != "text":
        yield from import_module("mobazoo.data.records").read_records(data)
        return
    for name, path in find_files(data):
        if in_split(name, data):  # known before it is read
            try:
                text = path.read_text("utf-8")
            except UnicodeDecodeError:
                if data.path == STDLIB:  # a few of its files are in other encodings on purpose
                    continue
                raise InputError(f"{path}: not text in UTF-8; leave it out by data.files") from None
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from None
            yield Document(name, text)
