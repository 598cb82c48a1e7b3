"""What a run left: stamps of its stages and JSON results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobazoo.errors import InputError
from mobazoo.results import read_results


@dataclass(frozen=True)
class Findings:
    """Everything a page can show.

    Attributes:
        stages: the stamps, in order; empty where verbs were called one by one.
        results: by name, in the order of the stages that wrote them, then by name.
    """

    stages: list[dict[str, Any]]
    results: dict[str, dict[str, Any]]

    def of(self, key: str) -> dict[str, Any]:
        """That part of every result that has it, by the result's name."""
        return {name: result[key] for name, result in self.results.items() if key in result}


def collect(folder: Path) -> Findings:
    """Reads a run's folder.

    Raises:
        InputError: no folder, no result in it, or a file that is not what its name says.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; want that of a run, or one with JSON results of eval, bench, ...")
    stages = [_stamp(path) for path in sorted((folder / ".stages").glob("*.json"))]
    results = read_results(folder)
    if not results:
        raise InputError(f"{folder}: holds no result; give eval, bench or generate a dest=....json in it")
    written = [Path(output).stem for stage in stages for output in stage["outputs"]]
    order = {name: written.index(name) if name in written else len(written) for name in results}
    return Findings(
        [stage for stage in stages if stage["verb"] != "report"],
        {name: results[name] for name in sorted(results, key=lambda name: (order[name], name))},
    )


def _stamp(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a stamp ({error}); remove it to run the stage again") from None
    if not isinstance(said, Mapping) or not {"verb", "outputs", "line", "seconds", "command", "recipe"} <= said.keys():
        raise InputError(f"{path}: not a stamp of this version; remove it to run the stage again")
    return dict(said)
