"""The page about a study: a table, a plot, and how they came about."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

from mobazoo.config.recipe import to_yaml
from mobazoo.errors import UnsupportedError
from mobazoo.files import write_whole
from tools.study.recipe import Study

Result = Mapping[str, Any]


def require_matplotlib() -> None:
    """Refuses to begin without what draws the plot.

    Raises:
        UnsupportedError: naming the extra.
    """
    if find_spec("matplotlib") is None:
        raise UnsupportedError("study: its plot needs matplotlib, which is not here; pip install 'mobazoo[report]'")


def write_page(study: Study, results: Sequence[Result]) -> list[Path]:
    """Writes the page and beside it the plot; returns their paths."""
    page = Path(study.page)
    drawing = page.with_suffix(".svg")
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    write_whole(drawing, _plot(arms))
    write_whole(page, "\n".join(_lines(study, arms, drawing.name)) + "\n")
    return [page, drawing]


def _lines(study: Study, arms: Mapping[str, Sequence[Result]], drawing: str) -> list[str]:
    every = [result for runs in arms.values() for result in runs]
    first = every[0]
    machines = sorted({", ".join(f"{key} {said}" for key, said in result["machine"].items()) for result in every})
    minutes = sum(result["train_seconds"] for result in every) / 60
    rows = [
        (
            name,
            f"{runs[0]['loss']['share_read']:.1%}",
            str(len(runs)),
            _values(runs, lambda r: r["loss"]["mean"]["mean"]),
            _values(runs, lambda r: r["loss"]["trailing"]["mean"]),
            _values(runs, lambda r: 100 * r["recall"]["share"], ".1f"),
        )
        for name, runs in arms.items()
    ]
    places = [f"{bucket['first']}-{bucket['last']}" for bucket in first["loss"]["by_position"]]
    by_position = [(name, *(f"{loss:.3f}" for loss in _by_position(runs))) for name, runs in arms.items()]
    least = max(_errors(every), default=0.0)
    return [
        "# Does it learn?",
        "",
        f"Written by `python -m tools.study {shlex.join(sys.argv[1:])}`; training took {minutes:.1f} minutes in all.",
        *(f"Machine: {machine}." for machine in machines),
        "What a study of this size can and cannot show: [README.md](README.md).",
        "",
        f"{first['parameters']:,} parameters, {first['recipe']['length']} tokens a row. Losses (nats per token) on "
        f"{first['texts']['count']} validation texts, standard error at most {least:.3f}. Trailing: "
        f"the last {first['recipe']['length'] // 4} positions. Recall: per cent of {first['recall']['asked']} "
        f"questions answered, chance {100 / study.recall.words:.1f}. "
        "With several seeds each value is given, and their mean.",
        "",
        *_table(("attention", "keys read", "seeds", "loss", "trailing loss", "recall"), rows),
        "",
        "Loss by position (means over seeds):",
        "",
        *_table(("attention", *places), by_position),
        "",
        f"![loss by position and recall]({drawing})",
        "",
        "The recipe:",
        "",
        "```yaml",
        to_yaml(replace(study, folder="", page=Path(study.page).name)).rstrip(),
        "```",
    ]


def _errors(every: Sequence[Result]) -> list[float]:
    found = [result["loss"][name]["error"] for result in every for name in ("mean", "trailing")]
    return [error for error in found if error is not None]


def _by_position(runs: Sequence[Result]) -> list[float]:
    every = [[bucket["loss"]["mean"] for bucket in run["loss"]["by_position"]] for run in runs]
    return [mean(losses) for losses in zip(*every, strict=True)]


def _values(runs: Sequence[Result], of: Callable[[Result], float], digits: str = ".3f") -> str:
    values = [of(run) for run in runs]
    each = ", ".join(f"{value:{digits}}" for value in values)
    return each if len(values) == 1 else f"{mean(values):{digits}} ({each})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _plot(arms: Mapping[str, Sequence[Result]]) -> str:
    matplotlib: Any = import_module("matplotlib")
    figures: Any = import_module("matplotlib.figure")
    with matplotlib.rc_context({"svg.hashsalt": "study", "axes.spines.top": False, "axes.spines.right": False}):
        figure = figures.Figure(figsize=(10, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for number, (name, runs) in enumerate(arms.items()):
            buckets = runs[0]["loss"]["by_position"]
            middle = [(bucket["first"] + bucket["last"]) / 2 for bucket in buckets]
            left.plot(
                middle, _by_position(runs), label=name, color=f"C{number % 10}", marker="osv^D<>p*Xh"[number % 11]
            )
            shares = [100 * run["recall"]["share"] for run in runs]
            right.barh(name, mean(shares), color=f"C{number % 10}", alpha=0.6)
            right.plot(shares, [name] * len(shares), "k|", markersize=12)
        left.set_xlabel("position in the text (tokens)")
        left.set_ylabel("loss (nats per token)")
        left.legend(fontsize=8, frameon=False)
        right.set_xlabel("recall (% of questions; a stroke is a seed)")
        right.set_xlim(0, 100)
        right.invert_yaxis()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date")))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
