"""Results as JSON files: what was measured, by which command and recipe, with what and on what kind of machine."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mobazoo._version import __version__
from mobazoo.attention.native import library
from mobazoo.config.recipe import plain
from mobazoo.errors import InputError
from mobazoo.files import RESULT, STAGE, check_result_place, signature, write_whole


def write_result(dest: str | Path, kind: str, recipe: Any, found: Mapping[str, Any]) -> Path:
    """Writes one result; ``dest`` appears complete or stays as it was.

    Args:
        dest: JSON file; its folder is made.
        kind: what was measured: ``eval``, ``bench``, ``generate``.
        recipe: as resolved.
        found: the figures, as plain JSON.

    Raises:
        InputError: a place that cannot be written, or holds something else than a result.
    """
    path = Path(dest).expanduser()
    check_result_place(path)
    stage = {} if signature() is None else {STAGE: signature()}
    said = {RESULT: kind, **stage, "command": command(), "recipe": plain(recipe), "machine": machine(), **found}
    write_whole(path, json.dumps(said, separators=(",", ":")) + "\n")
    return path


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results that lie directly in a folder, by file name without ``.json``; other JSON files are passed over.

    Raises:
        InputError: a file that is not JSON.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            said = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as JSON: {error}") from None
        if isinstance(said, dict) and RESULT in said:
            found[path.stem] = said
    return found


def command() -> str:
    """The command line that is running, as somebody would type it."""
    program = Path(sys.argv[0]).name
    return shlex.join(["mobazoo" if program == "__main__.py" else program, *sys.argv[1:]])


def machine() -> dict[str, str]:
    """What figures depend on; nothing that tells whose machine it is."""
    return {
        "cpu": _cpu(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {"loops": _loops()}),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "python": platform.python_version(),
        "mobazoo": __version__,
        "commit": _commit() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def lasting(about: Mapping[str, str]) -> dict[str, str]:
    """What of ``machine`` is the same tomorrow."""
    return {name: value for name, value in about.items() if name != "date"}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or platform.machine())


def _loops() -> str:
    """Who runs what torch's operators do badly on a CPU: see ``mobazoo.attention.native``."""
    return "torch" if library() is None else "compiled"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str | None:
    """The commit of this checkout; None for an installed package, which may lie in somebody else's repository."""
    here = Path(__file__)
    for arguments in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty"]):
        try:
            done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False)
        except OSError:
            return None
        if done.returncode:
            return None
    return done.stdout.strip() or None
