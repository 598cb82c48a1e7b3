"""The plots of a page, by matplotlib, as SVG whose colours the page decides."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mobazoo.report.html import length_label
from mobazoo.report.style import CHOSEN, FAINT, INK, OWN, PAPER, SERIES, VARIABLES

# About as wide as a phone, so that text is read there at its own size.
_WIDTH = 5.0
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mobazoo",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "legend.frameon": False,
}
_DASHES = ("--", "-", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def loss_by_position(losses: Mapping[str, Any], name: str) -> str:
    """Loss by position; a colour for each setting, a dash for each result.

    Args:
        losses: the part ``loss`` of eval results, by the result's name.
        name: of the plot, unique in its page.
    """
    settings = list(dict.fromkeys(setting for loss in losses.values() for setting in loss["settings"]))

    def draw(axes: Axes) -> None:
        for which, (result, loss) in enumerate(losses.items()):
            for setting, said in loss["settings"].items():
                number = settings.index(setting)
                middle = [(b["first"] + b["last"]) / 2 for b in said["by_position"]]
                values = [b["loss"]["mean"] for b in said["by_position"]]
                axes.plot(
                    middle,
                    values,
                    color=SERIES[number % len(SERIES)],
                    linestyle=_DASHES[which % len(_DASHES)],
                    marker=_MARKERS[number % len(_MARKERS)],
                    markersize=4,
                    markerfacecolor="none" if which == 0 and len(losses) > 1 else None,
                    label=f"{setting}, {result}",
                )
        axes.set_xlabel("position in the text (tokens)")
        axes.set_ylabel("loss (nats per token)")
        axes.set_xlim(left=0)
        axes.grid(axis="y", linewidth=0.6)
        axes.legend(fontsize=11, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return _single(draw, name, 4.0)


def prefill_time(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    """Seconds by length with full attention and with MoBA, both axes logarithmic, and how many times faster."""

    def draw(axes: Axes) -> None:
        lengths = [row["length"] for row in rows]
        for number, (key, label) in enumerate((("full", "full attention"), ("moba", "MoBA"))):
            values = [row[f"{key}_median_s"] for row in rows]
            axes.plot(lengths, values, color=SERIES[number], marker=_MARKERS[number], markersize=5, label=label)
        for row in rows:
            at = (row["length"], max(row["full_median_s"], row["moba_median_s"]))
            text = f"{row['speedup']:.1f}x"
            axes.annotate(text, at, xytext=(0, 7), textcoords="offset points", ha="center", fontsize=11, color=INK)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [length_label(length) for length in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.margins(x=0.08, y=0.15)
        axes.set_xlabel("prompt (tokens)")
        axes.set_ylabel("time to read it (seconds)")
        axes.grid(axis="y", linewidth=0.6)
        axes.legend(fontsize=11, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return _single(draw, name, 4.0)


def block_choices(layer: Mapping[str, Any], name: str, most: int = 4) -> str:
    """A picture for each of up to ``most`` heads: down the queries, across the blocks they read."""
    heads = dict(list(layer["heads"].items())[:most])
    columns = min(2, len(heads))
    rows = -(-len(heads) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.5 + 2.6 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(heads) :]:
            axes.set_axis_off()
        for place, (head, chosen) in enumerate(heads.items()):
            axes = grid.flat[place]
            picture, blocks = shares(chosen, layer["block_size"])
            axes.imshow(
                _coloured(picture, blocks, len(chosen), layer["block_size"]),
                interpolation="none",
                aspect="auto",
                extent=(0, blocks, len(chosen), 0),
            )
            axes.set_title(f"head {head}", fontsize=12)
            axes.grid(linewidth=0.4)
            if place % columns == 0:
                axes.set_ylabel("query (tokens)")
            else:
                axes.tick_params(labelleft=False)
            if place + columns >= len(heads):
                axes.set_xlabel(f"block of {layer['block_size']} tokens")
        return _svg(figure, name)


def mass_by_head(layers: Sequence[Mapping[str, Any]], name: str) -> str:
    """Share of full attention that blocks keep, down the layers, across the heads.

    Args:
        layers: of one setting of a probe, each with ``mass`` by head.
        name: of the plot, unique in its page.
    """
    values = np.array([layer["mass"] for layer in layers])

    def draw(axes: Axes) -> None:
        _heat_map(axes, values, [str(i) for i in range(values.shape[1])], [str(i) for i in range(len(values))])
        axes.set_xlabel("query head")
        axes.set_ylabel("layer")

    return _single(draw, name, min(7.0, 1.2 + 0.45 * len(values)))


def loss_by_layer(suggested: Mapping[str, Any], name: str) -> str:
    """Loss change with one layer switched to blocks, with standard errors; layers to leave full in another colour."""

    def draw(axes: Axes) -> None:
        for number, said in enumerate(suggested["layers"]):
            full = number in suggested["full"]
            axes.bar(
                number, said["mean"], color=SERIES[1 if full else 0], hatch="//" if full else None, edgecolor=PAPER
            )
            axes.errorbar(number, said["mean"], yerr=said["error"] or 0.0, color=INK, capsize=3, linewidth=1)
        axes.axhline(0, color=FAINT, linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer that is switched, alone")
        axes.set_ylabel("loss change (nats per token)")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)

    return _single(draw, name, 3.4)


def recall(settings: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> str:
    """Share found, a picture for each task and setting: across the lengths, down the depths."""
    tasks = list(dict.fromkeys(cell["task"] for cells in settings.values() for cell in cells))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.6 + 2.2 * len(tasks)), layout="constrained")
        grid = figure.subplots(len(tasks), len(settings), squeeze=False)
        for (row, task), (column, setting) in product(enumerate(tasks), enumerate(settings)):
            axes, cells = grid[row, column], [cell for cell in settings[setting] if cell["task"] == task]
            lengths, depths = (list(dict.fromkeys(cell[what] for cell in cells)) for what in ("length", "depth"))
            values = np.array([cell["score"]["mean"] for cell in cells]).reshape(len(lengths), len(depths)).T
            _heat_map(axes, values, [length_label(length) for length in lengths], [f"{100 * d:g} %" for d in depths])
            axes.set_title(f"{task}, {setting}", fontsize=12)
            if column:
                axes.tick_params(labelleft=False)
            else:
                axes.set_ylabel("depth")
            if row == len(tasks) - 1:
                axes.set_xlabel("prompt (tokens)")
        return _svg(figure, name)


def _heat_map(axes: Axes, values: np.ndarray, columns: Sequence[str], rows: Sequence[str]) -> None:
    """Shares as the opacity of one colour, so that light, dark and every colour vision read the same; numbers too."""
    picture = np.zeros((*values.shape, 4))
    picture[..., :3], picture[..., 3] = CHOSEN, 0.75 * values.clip(0, 1)  # never so full that letters drown
    axes.imshow(picture, interpolation="none", aspect="auto")
    for ticks, labels in ((axes.set_xticks, columns), (axes.set_yticks, rows)):
        step = -(-len(labels) // 8)
        ticks(range(0, len(labels), step), labels[::step])
    if values.shape[1] <= 8 and len(values) <= 16:
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=11, color=INK)
    axes.tick_params(length=0)


def shares(chosen: Sequence[Sequence[int]], block_size: int) -> tuple[np.ndarray, int]:
    """How many of the queries beside each other read each earlier block, and the number of blocks.

    Args:
        chosen: the blocks of each query, its own left out.
        block_size: tokens in a block.

    Returns:
        ``[rows, blocks]`` shares from 0 to 1, a row for a quarter of a block's queries.
    """
    blocks, step = -(-len(chosen) // block_size), max(1, block_size // 4)
    picture = np.zeros((-(-len(chosen) // step), blocks))
    for query, read in enumerate(chosen):
        picture[query // step, list(read)] += 1
    counts = np.bincount(np.arange(len(chosen)) // step)
    return picture / counts[:, None], blocks


def _coloured(picture: np.ndarray, blocks: int, queries: int, block_size: int) -> np.ndarray:
    """Shares as opacity, own blocks in a colour of their own: ``[rows, blocks, 4]``."""
    out = np.zeros((*picture.shape, 4))
    out[..., :3], out[..., 3] = CHOSEN, picture
    step = max(1, block_size // 4)
    for row in range(len(picture)):
        out[row, min(row * step // block_size, blocks - 1)] = (*OWN, 1.0)
    return out


def _single(draw: Any, name: str, height: float) -> str:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.subplots())
        return _svg(figure, name)


def _svg(figure: Figure, name: str) -> str:
    """A figure as an ``<svg>`` element for a page: ids of its own, no metadata, colours as variables."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    text = re.sub(r" ?font-family: [^;]*;", "", text)  # the page's own
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", text)  # nothing refers to them, and equal pictures share one
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
