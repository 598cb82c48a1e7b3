"""A probe's result as tables, for the console and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def chosen_setting(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of the grid that the suggestion is for, or its first."""
    grid: list[Mapping[str, Any]] = found["grid"]
    wanted = found.get("suggested", grid[0])
    return next(one for one in grid if all(one[key] == wanted[key] for key in ("block_size", "top_k")))


def grid_rows(found: Mapping[str, Any]) -> Table:
    """Header and rows of the table by setting."""
    header = ("block", "top_k", "keys read", "mass kept", "worst layer", "best blocks", "strongest key in", "tiles")
    rows = []
    for one in found["grid"]:
        mass, best, hit = ([_mean(layer[name]) for layer in one["layers"]] for name in ("mass", "best", "hit"))
        density = _mean([layer["density"] for layer in one["layers"]])
        shares = (one["share_read"], _mean(mass), min(mass), _mean(best), _mean(hit), density)
        rows.append((str(one["block_size"]), str(one["top_k"]), *(_percent(share) for share in shares)))
    return header, rows


def layer_rows(found: Mapping[str, Any], chosen: Mapping[str, Any]) -> Table:
    """Header and rows of the table by layer, for one setting."""
    header = ("layer", "mass kept", "worst head", "best blocks", "strongest key in", "tiles", "SNR", "SNR measured")
    signal = next(one["layers"] for one in found["signal"] if one["block_size"] == chosen["block_size"])
    changes = found["suggested"]["layers"] if "suggested" in found else []
    rows = []
    for number, (layer, heard) in enumerate(zip(chosen["layers"], signal, strict=True)):
        shares = (_mean(layer["mass"]), min(layer["mass"]), _mean(layer["best"]), _mean(layer["hit"]), layer["density"])
        cells = [str(number), *(_percent(share) for share in shares)]
        cells += [f"{_mean(heard[name]):.2f}" for name in ("snr", "measured")]
        if changes:
            error = changes[number]["error"]
            cells += [f"{changes[number]['mean']:+.4f}", "" if error is None else f"{error:.4f}"]
        rows.append(tuple(cells))
    return (*header, "loss change", "±") if changes else header, rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
