"""The plots of a page about losses, probes, recall and block choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mobazoo.report.draw import Plot, faint, ink, paper, series, single
from mobazoo.report.html import length_label
from mobazoo.report.style import CHOSEN, OWN

DASHES = ("--", "-", ":", "-.")
MARKERS = ("o", "s", "^", "D")


def loss_by_position(losses: Mapping[str, Any], name: str) -> Plot:
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
                    color=series(number),
                    linestyle=DASHES[which % len(DASHES)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4,
                    markerfacecolor="none" if which == 0 and len(losses) > 1 else None,
                    label=f"{setting}, {result}",
                )
        axes.set_xlabel("position in the text (tokens)")
        axes.set_ylabel("loss (nats per token)")
        axes.set_xlim(left=0)
        axes.grid(axis="y", linewidth=0.6)
        axes.legend(fontsize=11, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return single(draw, name, 4.0)


def block_choices(layer: Mapping[str, Any], name: str, most: int = 4) -> Plot:
    """A picture for each of up to ``most`` heads: down the queries, across the blocks they read."""
    heads = dict(list(layer["heads"].items())[:most])
    columns = min(2, len(heads))
    rows = -(-len(heads) // columns)

    def draw(figure: Figure) -> None:
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

    return Plot(name, 0.5 + 2.6 * rows, draw)


def block_load(layers: Sequence[Mapping[str, Any]], name: str) -> Plot:
    """How often each block is read, down the layers, across the blocks: the share of the later queries, over all heads.

    Args:
        layers: of one block size, each with ``layer``, ``block_size`` and the choices of ``heads``.
        name: of the plot, unique in its page.
    """
    values = np.array([load(list(layer["heads"].values()), layer["block_size"]) for layer in layers])

    def draw(axes: Axes) -> None:
        columns, top = [str(block) for block in range(values.shape[1])], float(values.max(initial=0.0)) or 1.0
        _heat_map(axes, values, columns, [str(layer["layer"]) for layer in layers], top)
        axes.set_xlabel(f"block of {layers[0]['block_size']} tokens (fullest colour: {100 * top:.0f} %)")
        axes.set_ylabel("layer")

    return single(draw, name, min(7.0, 1.2 + 0.45 * len(values)))


def load(heads: Sequence[Sequence[Sequence[int]]], block_size: int) -> list[float]:
    """Share of the queries behind a block's end that chose it, for every block that has such queries.

    Args:
        heads: for each head, the blocks of each query, its own left out.
        block_size: tokens in a block.

    Example:
        >>> load([[[], [], [0], [0], [0], [1]]], 2)
        [0.75, 0.5]
    """
    length = len(heads[0])
    blocks = (length - 1) // block_size
    counts = [0] * blocks
    for queries in heads:
        for read in queries:
            for block in read:
                counts[block] += 1
    return [count / len(heads) / (length - (block + 1) * block_size) for block, count in enumerate(counts)]


def mass_by_head(layers: Sequence[Mapping[str, Any]], name: str) -> Plot:
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

    return single(draw, name, min(7.0, 1.2 + 0.45 * len(values)))


def loss_by_layer(suggested: Mapping[str, Any], name: str) -> Plot:
    """Loss change with one layer switched to blocks, with standard errors; layers to leave full in another colour."""

    def draw(axes: Axes) -> None:
        for number, said in enumerate(suggested["layers"]):
            full = number in suggested["full"]
            axes.bar(
                number, said["mean"], color=series(1 if full else 0), hatch="//" if full else None, edgecolor=paper()
            )
            axes.errorbar(number, said["mean"], yerr=said["error"] or 0.0, color=ink(), capsize=3, linewidth=1)
        axes.axhline(0, color=faint(), linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer that is switched, alone")
        axes.set_ylabel("loss change (nats per token)")
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)

    return single(draw, name, 3.4)


def recall(settings: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> Plot:
    """Share found, a picture for each task and setting: across the lengths, down the depths."""
    tasks = list(dict.fromkeys(cell["task"] for cells in settings.values() for cell in cells))

    def draw(figure: Figure) -> None:
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

    return Plot(name, 0.6 + 2.2 * len(tasks), draw)


def _heat_map(axes: Axes, values: np.ndarray, columns: Sequence[str], rows: Sequence[str], top: float = 1.0) -> None:
    """Shares as the opacity of one colour, so that light, dark and every colour vision read the same; numbers too."""
    picture = np.zeros((*values.shape, 4))
    picture[..., :3], picture[..., 3] = CHOSEN, 0.75 * (values / top).clip(0, 1)  # never so full that letters drown
    axes.imshow(picture, interpolation="none", aspect="auto")
    for ticks, labels in ((axes.set_xticks, columns), (axes.set_yticks, rows)):
        step = -(-len(labels) // 8)
        ticks(range(0, len(labels), step), labels[::step])
    if values.shape[1] <= 8 and len(values) <= 16:
        for (row, column), value in np.ndenumerate(values):
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=11, color=ink())
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
