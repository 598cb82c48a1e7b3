"""Where a checkpoint may be written."""

from __future__ import annotations

from pathlib import Path

from mobazoo.checkpoint.folder import CONFIG
from mobazoo.checkpoint.staging import named_errors
from mobazoo.checkpoint.write import is_small
from mobazoo.errors import InputError
from mobazoo.files import MARK

METRICS = "metrics.jsonl"


def free_place(dest: str, overwrite: bool, mark: str = CONFIG) -> Path:
    """``dest``, resolved up to its own name.

    Args:
        dest: the folder to write.
        overwrite: whether a checkpoint that is there may go.
        mark: the file that every folder of the kind to be replaced has.

    Raises:
        InputError: something is there that must not go.
    """
    given = Path(dest).expanduser().absolute()
    place = given.parent.resolve() / given.name
    with named_errors(place):
        _check(place, overwrite, mark)
    return place


def _check(dest: Path, overwrite: bool, mark: str) -> None:
    if not dest.name or dest.is_symlink():
        raise InputError(f"{dest}: is a link or a root; name the folder itself")
    if not dest.exists():
        return
    if not dest.is_dir():
        raise InputError(f"{dest}: exists and is not a folder; choose another dest")
    if not any(dest.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{dest}: exists; pass overwrite=true to replace it, or choose another dest")
    foreign = [path.name for path in dest.iterdir() if not _replaceable(path)]
    if foreign or not (dest / mark).exists():
        what = f"holds {sorted(foreign)[0]!r}" if foreign else f"has no {mark}"
        raise InputError(f"{dest}: {what}, so it is more than a checkpoint; overwriting would lose it, move it away")


def _replaceable(path: Path) -> bool:
    known = is_small(path.name) or path.name in (METRICS, MARK) or path.suffix == ".safetensors"
    return known and not path.is_dir()
