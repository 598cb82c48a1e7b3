"""What a run left: stamps of its stages and JSON results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobazoo.errors import InputError
from mobazoo.files import read_stamp
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
    stamps = map(read_stamp, sorted((folder / ".stages").glob("*.json")))
    stages = [stamp for stamp in stamps if stamp is not None]
    results = read_results(folder)
    if not results:
        raise InputError(f"{folder}: holds no result; give eval, bench or generate a dest=....json in it")
    written = [Path(output).stem for stage in stages for output in stage["outputs"]]
    order = {name: written.index(name) if name in written else len(written) for name in results}
    return Findings(
        [stage for stage in stages if stage["verb"] != "report"],
        {name: results[name] for name in sorted(results, key=lambda name: (order[name], name))},
    )
