"""An evaluation's results as tables, for the console and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def loss_rows(loss: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table, a row for each setting."""
    trailing = f"last {loss['trailing_tokens']}"
    header = ("setting", "mean loss", "±", trailing, "±", "difference", "±", f"{trailing}: difference", "±", "keys")
    rows = []
    for name, said in loss["settings"].items():
        cells: list[str] = []
        for what, digits in (("mean", 3), ("trailing", 3), ("difference", 4), ("trailing_difference", 4)):
            error = said[what]["error"]
            cells += [f"{said[what]['mean']:.{digits}f}", "" if error is None else f"{error:.{digits}f}"]
        rows.append((name, *cells, f"{100 * said['share_read']:.3g} %"))
    return header, rows


def recall_rows(recall: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table, a row for each task and length."""
    settings = recall["settings"]
    header = ("task", "tokens", *(f"{name}: {what}" for name in settings for what in ("found", "loss")))
    places = dict.fromkeys((cell["task"], cell["length"]) for cell in next(iter(settings.values())))
    rows = []
    for task, length in places:
        cells = [task, str(length)]
        for said in settings.values():
            some = [cell for cell in said if (cell["task"], cell["length"]) == (task, length)]
            cells += [f"{100 * _mean(some, 'score'):.0f} %", f"{_mean(some, 'loss'):.3f}"]
        rows.append(tuple(cells))
    return header, rows


def found_shares(recall: Mapping[str, Any]) -> dict[str, str]:
    """What each setting found, over all cells."""
    return {name: f"{100 * _mean(cells, 'score'):.0f} %" for name, cells in recall["settings"].items()}


def _mean(cells: Sequence[Mapping[str, Any]], what: str) -> float:
    return float(sum(cell[what]["mean"] for cell in cells) / len(cells))


def harness_rows(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of the table of lm-eval, a row for each task and metric."""
    settings = found["settings"]
    rows = []
    for task, said in next(iter(settings.values())).items():
        for metric in said["metrics"]:
            some = [setting[task]["metrics"][metric] for setting in settings.values()]
            rows.append((task, metric, str(said["samples"]), *(_plus_minus(one) for one in some)))
    return ("task", "metric", "samples", *settings), rows


def _plus_minus(said: Mapping[str, Any]) -> str:
    return f"{said['value']:.4g}" + ("" if said["error"] is None else f" ± {said['error']:.2g}")
