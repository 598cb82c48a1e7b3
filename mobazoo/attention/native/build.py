"""Compiles the C++ of this folder for this processor, keeps the result, and loads it."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from contextlib import suppress
from ctypes import CDLL, c_int64, c_void_p
from errno import EACCES
from functools import cache
from pathlib import Path
from stat import S_IWGRP, S_IWOTH
from tempfile import TemporaryDirectory
from threading import Lock

from mobazoo.errors import UnsupportedError

log = logging.getLogger("mobazoo.attention")

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))

# Products may be added without rounding between. No other arithmetic is relaxed: infinities and what is no number keep
# their meaning.
_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC", "-pthread")
_THIS_PROCESSOR = "-march=native"  # which not every compiler knows on every processor
_LONGEST = 120  # seconds
_POSIX = os.name == "posix"
_P, _I = c_void_p, c_int64
# Arguments and result of each function.
_SIGNATURES = {
    "moba_gate": ((_P, _I), _I),
    "moba_forward": ((_P, _I), _I),
    "moba_backward": ((_P, _I), _I),
}
_LOCK = Lock()
_UNFINISHED = "making-"  # begins the names of folders that are compiled in


def _renew_lock() -> None:
    global _LOCK
    _LOCK = Lock()


if hasattr(os, "register_at_fork"):  # a fork while another thread compiles leaves nobody who would open it
    os.register_at_fork(after_in_child=_renew_lock)


def compiler() -> str:
    """The C++ compiler: ``CXX``, or ``g++``, which PyTorch's own compilation calls too."""
    return os.environ.get("CXX", "g++")


def library() -> CDLL | None:
    """The compiled functions; None, said once in the log, where they cannot be had.

    The first call on a machine compiles them, which takes some ten seconds. Other Python threads run while one of them
    does.
    """
    with _LOCK:
        return _library()


@cache
def _library() -> CDLL | None:
    try:
        if not _POSIX:
            raise UnsupportedError(f"its code in C++ is for Linux and macOS, this is {platform.system()}")
        return _load()
    except (OSError, UnsupportedError) as error:
        log.warning("attention on a CPU is slower than it could be: %s", error)
        return None


def _load() -> CDLL:
    """From the user's cache, or compiled into it."""
    name = f"cpu-{_digest()}"
    folder: Path | None = None
    try:
        folder = _cache()
        kept = _kept(folder, name)
        if kept is not None:
            return kept
        _clear(folder)
        room = TemporaryDirectory(dir=folder, prefix=_UNFINISHED)
    except (OSError, RuntimeError) as error:
        log.info("compiled code is not kept, so that every process compiles anew: %s", error)
        room = TemporaryDirectory(prefix="mobazoo-")
        folder = None
    with room as beside:
        made = Path(beside, name)
        _compile(made)
        loaded = _opened(made)
        if folder is not None:
            _keep(made, folder)
    return loaded


def _kept(folder: Path, name: str) -> CDLL | None:
    """What was compiled before. A torn file would kill the process, so that its name says what it holds."""
    for place in folder.glob(f"{name}-*.so"):
        with suppress(OSError, UnsupportedError):
            if place.name == _name_of(place, name):
                return _opened(place)
            place.unlink()
    return None


def _keep(made: Path, folder: Path) -> None:
    try:
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(folder / _name_of(made, made.name))
    except OSError as error:
        log.info("compiled code is not kept, so that every process compiles anew: %s", error)


def _name_of(place: Path, name: str) -> str:
    return f"{name}-{hashlib.sha256(place.read_bytes()).hexdigest()[:16]}.so"


def _opened(place: Path) -> CDLL:
    loaded = CDLL(str(place))
    for name, (takes, gives) in _SIGNATURES.items():
        try:
            function = getattr(loaded, name)
        except AttributeError:
            raise UnsupportedError(f"what {compiler()} made of the C++ has no {name}; set CXX to another") from None
        function.argtypes, function.restype = takes, gives
    return loaded


def _clear(folder: Path) -> None:
    """Removes what compilations left behind that were killed; no living one takes as long."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 4 * _LONGEST:
                shutil.rmtree(left, ignore_errors=True)


def _cache() -> Path:
    """The user's folder for compiled code, made if need be; an error where it cannot be or others may write there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "mobazoo")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & (S_IWGRP | S_IWOTH):
        raise PermissionError(EACCES, "others may write there", str(folder))
    return folder


def _digest() -> str:
    """Of all that the compiled code depends on."""
    said = "\n".join((*(each.read_text("utf-8") for each in (*SOURCES, *HEADERS)), *_OPTIONS, compiler(), _processor()))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _processor() -> str:
    """What tells processors with other instructions apart: a home may be shared by several machines."""
    said = [platform.machine()]
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if not line.strip():  # the first of many
                break
            said += [line] if line.startswith(("model name", "flags", "Features", "CPU ")) else []
    return "".join(said)


def _compile(place: Path) -> None:
    """Raises ``UnsupportedError`` where nothing comes of it."""
    try:
        command, failed = shlex.split(compiler()), ""
    except ValueError as error:
        raise UnsupportedError(f"the C++ compiler {compiler()!r} is no command ({error}); set CXX to one") from None
    log.info("compiling code for attention on this CPU by %s", compiler())
    for option in ([_THIS_PROCESSOR], []):
        call = [*command, *_OPTIONS, *option, "-o", str(place), *map(str, SOURCES)]
        try:
            subprocess.run(call, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=_LONGEST)
        except (FileNotFoundError, PermissionError, IndexError):
            raise UnsupportedError(f"the C++ compiler {compiler()!r} is not there; install it or set CXX") from None
        except subprocess.TimeoutExpired:
            raise UnsupportedError(f"{compiler()} took more than {_LONGEST} s; set CXX to another compiler") from None
        except subprocess.CalledProcessError as error:
            lines = error.stderr.splitlines() or ["it said nothing"]
            first = next((line for line in lines if "error" in line), lines[0])
            failed = f"{compiler()} ends with {error.returncode} ({first}); set CXX to another compiler"
        else:
            return
    raise UnsupportedError(failed)
