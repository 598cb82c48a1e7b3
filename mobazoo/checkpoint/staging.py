"""A folder that appears complete or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from mobazoo.errors import InputError
from mobazoo.files import MARK, NEW, OLD, beside, signature

_FULL = (errno.ENOSPC, errno.EDQUOT)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def staged(dest: Path, *, replace: bool) -> Iterator[Path]:
    """A new folder beside ``dest`` that becomes ``dest`` when the block ends well and is removed when it does not.

    What an earlier run left when it was killed is removed, or put back where it had moved the old folder away. A kill
    at any time leaves the old folder or the new one, never a mixture.

    Raises:
        InputError: another run is writing the same folder, the disk is full, or the place cannot be written.
    """
    new, old = beside(dest, NEW), beside(dest, OLD)
    with named_errors(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(new, dest)
        try:
            _recover(dest, new, old)
            yield new
            if (stage := signature()) is not None:
                (new / MARK).write_text(stage, encoding="utf-8")
            _sync(new)
            _swap(new, dest, old, replace)
        finally:
            # After the swap `new` is gone, or on the exchange path holds what was replaced.
            shutil.rmtree(new, ignore_errors=True)
            os.close(lock)


def _locked(new: Path, dest: Path) -> int:
    """Makes the folder and holds a lock on it that dies with this process."""
    while True:
        new.mkdir(exist_ok=True)
        handle = os.open(new, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise InputError(f"{dest}: another process is writing it; wait for it to end") from None
        except OSError:  # a file system without locks
            return handle
        # Whoever held it may have put the folder in place meanwhile; then this lock is on the finished one.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), new.stat()):
                return handle
        os.close(handle)


def _recover(dest: Path, new: Path, old: Path) -> None:
    if old.exists():
        if dest.exists():
            shutil.rmtree(old)
        else:
            old.rename(dest)
    for left in new.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def _swap(new: Path, dest: Path, old: Path, replace: bool) -> None:
    if dest.exists() and any(dest.iterdir()):
        if not replace:
            raise InputError(f"{dest}: appeared meanwhile; pass overwrite=true to replace it")
        if not _exchange(new, dest):
            dest.rename(old)
            new.rename(dest)
            shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(dest)
    _sync_one(dest.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step, where the system can (Linux)."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def _sync(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() or path.stat().st_nlink == 1:  # linked files are the source's, and on disk
            _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def named_errors(dest: Path) -> Iterator[None]:
    """Turns what can go wrong with a disk into one line."""
    try:
        yield
    except SafetensorError as error:
        if not any(f"os error {number})" in str(error) for number in _FULL):
            raise InputError(f"{dest}: cannot be written: {error}; nothing was changed") from None
        raise _full(dest) from None
    except OSError as error:
        if error.errno in _FULL:
            raise _full(dest) from None
        raise InputError(f"{dest}: cannot be written: {error.strerror} ({error.filename})") from None


def _full(dest: Path) -> InputError:
    return InputError(f"{dest}: disk full; nothing was changed; free some space or choose another dest")
