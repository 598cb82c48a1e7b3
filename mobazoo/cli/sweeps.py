"""The table of a sweep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mobazoo.cli.output import size

HEADER = ("mode", "dtype", "tokens", "blocks", "what", "ms", "range", "faster than", "range", "peak", "tiles")


def sweep_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each contender at each point; one that was left out says why."""
    for row in found["sweep"]:
        place = (row["mode"], row["dtype"], str(row["length"]), f"{row['block_size']} x {row['top_k']}")
        for run in row["runs"]:
            if "skipped" in run:
                yield (*place, run["name"], f"left out: {run['skipped']}", "", "", "", "", "")
                continue
            took = run["seconds"]
            faster = ("", "")
            if "speedup" in run:
                faster = (
                    f"{run['speedup']:.2f} x {run['against']}",
                    f"{run['speedup_min']:.2f} to {run['speedup_max']:.2f}",
                )
            peak = "" if run["peak_bytes"] is None else size(run["peak_bytes"])
            tiles = row["tile_density"] if run["name"].startswith("MoBA") else None
            yield (
                *place,
                run["name"],
                _ms(run["median_s"]),
                f"{_ms(min(took))} to {_ms(max(took))}",
                *faster,
                peak,
                "" if tiles is None else f"{100 * tiles:.1f} %",
            )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds >= 0.01 else f"{1e3 * seconds:.3f}"
