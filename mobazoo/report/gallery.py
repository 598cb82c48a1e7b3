"""The plots that a page has shown."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from mobazoo.files import write_whole
from mobazoo.report.html import figure
from mobazoo.report.style import THEMES


class Gallery:
    """Draws plots into a page and keeps them, to write them as pictures too. Needs matplotlib.

    Attributes:
        plots: the module of plots by losses, probes, recall and choices.
        times: the module of plots by length.
        shown: the plots, in the page's order.
    """

    def __init__(self) -> None:
        self.plots: Any = import_module("mobazoo.report.plots")
        self.times: Any = import_module("mobazoo.report.time_plots")
        self.shown: list[Any] = []

    def figure(self, plot: Any, alternative: str, caption: str) -> str:
        """A plot with what it shows in words, as HTML."""
        self.shown.append(plot)
        return figure(plot.svg(), alternative, caption)

    def write(self, folder: Path) -> None:
        """Every plot as ``NAME-light.png`` and ``NAME-dark.png``.

        Raises:
            InputError: a place that cannot be written.
        """
        for plot in self.shown:
            for theme in THEMES:
                write_whole(folder / f"{plot.name}-{theme}.png", plot.png(theme))
