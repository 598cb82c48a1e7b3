"""The recipe of ``mobazoo report``. Plain data: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mobazoo.extras import require


@dataclass(frozen=True, slots=True)
class ReportRecipe:
    """One page about a run.

    Attributes:
        run: folder of the run, with the JSON results of its stages.
        dest: HTML file (None: ``report.html`` in that folder).
        title: heading of the page.
        pictures: whether to write every plot as PNG too, light and dark, into ``report-pictures`` beside the page.
    """

    run: str
    dest: str | None = None
    title: str = "MoBA: what it costs and what it saves"
    pictures: bool = True

    def page(self) -> Path:
        """The HTML file to write."""
        return Path(self.dest or Path(self.run, "report.html")).expanduser()

    def require(self) -> None:
        """Refuses to begin without the libraries it needs.

        Raises:
            UnsupportedError: one that is not here.
        """
        require("matplotlib", "report", "mobazoo[report]")
