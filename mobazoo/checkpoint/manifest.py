"""A list of sha256 sums beside a checkpoint we write, checked when somebody asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from mobazoo.checkpoint.folder import inside, read_json
from mobazoo.errors import InputError

MANIFEST = "mobazoo.manifest.json"


def write_manifest(folder: Path, done: Callable[[int], None] | None = None) -> None:
    """Sums of all files in ``folder``; ``done`` is told how many bytes were read."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: {"size": (folder / name).stat().st_size, "sha256": _sum(folder / name, done)} for name in names}
    (folder / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=2) + "\n", encoding="utf-8")


def check_manifest(folder: Path, done: Callable[[int], None] | None = None) -> None:
    """Compares every listed file with its sum.

    Raises:
        InputError: no manifest, a missing file, or files that differ, all named.
    """
    if not (folder / MANIFEST).exists():
        raise InputError(f"{folder}: has no {MANIFEST}; only folders written by `mobazoo convert` have one")
    files = read_json(inside(folder, MANIFEST)).get("files")
    if not isinstance(files, dict) or not all(isinstance(said, dict) for said in files.values()):
        raise InputError(f"{folder / MANIFEST}: want files, an object from file name to size and sha256")
    differ = []
    for name, said in files.items():
        path = inside(folder, name)
        if path.stat().st_size != said.get("size") or _sum(path, done) != said.get("sha256"):
            differ.append(name)
    if differ:
        raise InputError(f"{folder}: changed since it was written: {', '.join(differ)}")


def _sum(path: Path, done: Callable[[int], None] | None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
            if done is not None:
                done(len(chunk))
    return digest.hexdigest()
