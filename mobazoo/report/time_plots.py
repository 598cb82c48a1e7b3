"""The plots of a page about time by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mobazoo.report.draw import Plot, ink, series, single
from mobazoo.report.html import length_label
from mobazoo.report.plots import MARKERS


def prefill_time(rows: Sequence[Mapping[str, Any]], name: str) -> Plot:
    """Seconds by length with full attention and with MoBA, both axes logarithmic, and how many times faster."""

    def draw(axes: Axes) -> None:
        lengths = [row["length"] for row in rows]
        for number, (key, label) in enumerate((("full", "full attention"), ("moba", "MoBA"))):
            _curve(axes, number, lengths, [row[f"{key}_median_s"] for row in rows], label)
        for row in rows:
            at = (row["length"], max(row["full_median_s"], row["moba_median_s"]))
            text = f"{row['speedup']:.1f}x"
            axes.annotate(text, at, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=11, color=ink())
        _axes(axes, lengths, "prompt (tokens)", "time to read it (seconds)")

    return single(draw, name, 4.0)


def sweep_time(rows: Sequence[Mapping[str, Any]], name: str) -> Plot:
    """Milliseconds by length, a curve for each contender, both axes logarithmic; what was left out is not there.

    Args:
        rows: of one mode, dtype and setting.
        name: of the plot, unique in its page.
    """
    names = [run["name"] for run in rows[0]["runs"]]

    def draw(axes: Axes) -> None:
        for number, contender in enumerate(names):
            found = [
                (row["length"], 1e3 * run["median_s"])
                for row in rows
                for run in row["runs"]
                if run["name"] == contender and "median_s" in run
            ]
            if found:
                _curve(axes, number, [one for one, _ in found], [one for _, one in found], contender)
        kind = {"prefill": "forward", "train": "forward and backward", "decode": "one token"}[rows[0]["mode"]]
        _axes(axes, [row["length"] for row in rows], "length (tokens)", f"{kind} (milliseconds)")

    return single(draw, name, 4.0)


def _curve(axes: Axes, number: int, x: Sequence[float], y: Sequence[float], label: str) -> None:
    marker = MARKERS[number % len(MARKERS)]
    axes.plot(x, y, color=series(number), marker=marker, markersize=5, label=label)


def _axes(axes: Axes, lengths: Sequence[int], across: str, up: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    shown = lengths[:: -(-len(lengths) // 8)]
    axes.set_xticks(shown, [length_label(length) for length in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.08, y=0.15)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(axis="y", linewidth=0.6)
    axes.legend(fontsize=11, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
