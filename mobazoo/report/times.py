"""Parts of the page about time by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mobazoo.report.collect import Findings
from mobazoo.report.gallery import Gallery
from mobazoo.report.html import length_label, more, paragraph, section, table

_MODES = {"prefill": "attention, forward", "train": "attention, forward and backward", "decode": "attention, one token"}


def prefills(findings: Findings, gallery: Gallery) -> list[str]:
    """Time that a checkpoint takes to read a prompt."""
    parts = []
    for name, rows in findings.of("prefill").items():
        cells = [
            (
                f"{row['length']}",
                f"{row['full_median_s']:.3f}",
                f"{row['moba_median_s']:.3f}",
                f"{row['speedup']:.2f}",
                f"{row['speedup_min']:.2f} to {row['speedup_max']:.2f}",
                f"{100 * row['share_read']:.3g} %",
            )
            for row in rows
        ]
        said = "; ".join(f"{cell[0]} tokens: full {cell[1]} s, MoBA {cell[2]} s" for cell in cells)
        rounds = len(rows[0]["full_s"])
        caption = (
            f"Medians of {rounds} rounds in turn; at each length, how many times faster MoBA is (below 1: slower)."
        )
        header = ("tokens", "full s", "MoBA s", "times faster", "range", "keys read")
        plot = gallery.times.prefill_time(rows, f"prefill-{name}")
        parts.append(
            section(
                "Time to read a prompt",
                gallery.figure(plot, f"Line plot of prefill time: {said}.", caption),
                more("the numbers", table(header, cells)),
            )
        )
    return parts


def sweeps(findings: Findings, gallery: Gallery) -> list[str]:
    """Time of attention alone, a part for each mode, dtype and setting."""
    parts = []
    for name, rows in findings.of("sweep").items():
        groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
        for row in rows:
            groups.setdefault((row["mode"], row["dtype"], _setting(row)), []).append(row)
        for number, ((mode, dtype, setting), some) in enumerate(groups.items()):
            if any("median_s" in run for row in some for run in row["runs"]):
                plot = gallery.times.sweep_time(some, f"sweep-{name}-{number}")
                parts.append(_sweep(f"Time of {_MODES[mode]}", f"{setting}, {dtype}", some, plot, gallery))
    return parts


def _sweep(title: str, setting: str, rows: Sequence[Mapping[str, Any]], plot: Any, gallery: Gallery) -> str:
    cells, left, said = [], [], []
    for row in rows:
        for run in row["runs"]:
            if "skipped" in run:
                left.append(f"{run['name']} at {length_label(row['length'])} {run['skipped']}")
                continue
            took = run["seconds"]
            faster = f"{run['speedup']:.2f} x {run['against']}" if "speedup" in run else ""
            peak = "" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 2**20:.0f}"
            span = f"{1e3 * min(took):.2f} to {1e3 * max(took):.2f}"
            cells.append((str(row["length"]), run["name"], f"{1e3 * run['median_s']:.2f}", span, faster, peak))
            said.append(f"{length_label(row['length'])} {run['name']} {1e3 * run['median_s']:.2f} ms")
    dense = [row["tile_density"] for row in rows if row["tile_density"] is not None]
    tiles = f" Blocks touch {100 * dense[-1]:.0f} % of the causal tiles at the longest length counted." if dense else ""
    header = ("tokens", "what", "ms", "range", "faster than", "peak MiB")
    return section(
        title,
        gallery.figure(plot, f"Line plot of time by length: {'; '.join(said)}.", f"{setting}; random inputs.{tiles}"),
        more("the numbers", table(header, cells)),
        *([more("what was left out", *(paragraph(line) for line in left))] if left else []),
    )


def _setting(row: Mapping[str, Any]) -> str:
    blocks = f"{row['count']} blocks" if row["count"] else f"blocks of {row['block_size']}"
    return f"{blocks}, top {row['top_k']}"
