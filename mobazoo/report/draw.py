"""One drawing of a plot, as SVG whose colours the page decides, and as PNG, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mobazoo.report.style import STAND_INS, THEMES, VARIABLES

# About as wide as a phone, so that text is read there at its own size.
_WIDTH = 5.0
_DPI = 200


@dataclass(frozen=True)
class Plot:
    """A plot that is not drawn yet.

    Attributes:
        name: unique in its page, and of its PNG files.
        height: inches.
        draw: fills a figure; it takes colours from ``ink``, ``paper`` and ``series``.
    """

    name: str
    height: float
    draw: Callable[[Figure], None]

    def svg(self) -> str:
        """An ``<svg>`` element for a page: ids of its own, no metadata, colours as variables."""
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        with mpl.rc_context(_style(STAND_INS)):
            self._drawn().savefig(file, format="svg", transparent=True, metadata=nothing)
        text = file.getvalue()
        text = text[text.index("<svg") :].strip()
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
        text = re.sub(
            r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
        )
        text = re.sub(r" ?font-family: [^;]*;", "", text)  # the page's own
        for colour, variable in VARIABLES.items():
            text = text.replace(colour, f"var({variable})")
        text = re.sub(
            r'(<image\b[^>]*?) id="[^"]*"', r"\1", text
        )  # nothing refers to them, and equal pictures share one
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        return text.replace('href="#', f'href="#{self.name}-').replace("url(#", f"url(#{self.name}-")

    def png(self, theme: str) -> bytes:
        """A picture file, ``light`` or ``dark``."""
        file = io.BytesIO()
        with mpl.rc_context(_style(THEMES[theme])):
            self._drawn().savefig(file, format="png", dpi=_DPI, metadata={"Software": None})
        return file.getvalue()

    def _drawn(self) -> Figure:
        figure = Figure(figsize=(_WIDTH, self.height), layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(figure)
        return figure


def single(draw: Callable[[Axes], None], name: str, height: float) -> Plot:
    """A plot of one pair of axes."""
    return Plot(name, height, lambda figure: draw(figure.subplots()))


def ink() -> str:
    """The colour of letters, now."""
    return str(mpl.rcParams["text.color"])


def paper() -> str:
    """The colour behind, now."""
    return str(mpl.rcParams["figure.facecolor"])


def faint() -> str:
    """The colour of lines that only help, now."""
    return str(mpl.rcParams["grid.color"])


def series(number: int) -> str:
    """The colour of a curve, now."""
    colours = mpl.rcParams["axes.prop_cycle"].by_key()["color"]
    return str(colours[number % len(colours)])


def _style(colours: Mapping[str, str]) -> Any:
    said, faint = colours["--ink"], colours["--faint"]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "mobazoo",
        "font.size": 12,
        "text.color": said,
        "figure.facecolor": colours["--paper"],
        "axes.edgecolor": faint,
        "axes.labelcolor": said,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=[value for name, value in colours.items() if "series" in name]),
        "xtick.color": said,
        "ytick.color": said,
        "grid.color": faint,
        "legend.frameon": False,
    }
