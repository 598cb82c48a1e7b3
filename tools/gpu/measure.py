"""Times and memory of several candidates in turn; whoever cannot says why, and the others go on."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

_ROUNDS = {"cuda": 7, "cpu": 1}
_LONG_ENOUGH = {"cuda": 0.02, "cpu": 0.0}  # seconds of one sample; shorter calls are repeated in it
_MOST_REPEATS = 50

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Candidate:
    """Somebody who computes something: ``kind`` says what it is compared with, ``check`` gives errors, at most 1."""

    kind: str
    work: Callable[[], Any]
    check: Callable[[], dict[str, float]] | None = None


def measure(candidates: dict[str, Candidate], device: str, seconds: float) -> Iterator[Rows]:
    """Rows of all candidates by name, each time more complete: first calls, times, errors.

    Args:
        candidates: who, in the order of the table.
        device: ``cuda``, or ``cpu`` for a dry run.
        seconds: of measuring, after the first call of each.
    """
    rows: Rows = {name: {"kind": one.kind, "seconds": []} for name, one in candidates.items()}
    for name, one in candidates.items():
        first = attempt(rows[name], partial(once, one.work, device))
        if first is not None:
            rows[name]["first_seconds"] = first[0]
    yield rows
    begin = time.perf_counter()
    repeats = dict.fromkeys(candidates, 1)
    for number in range(_ROUNDS[device]):  # in turn, so that a clock that drifts favours nobody
        if number and (time.perf_counter() - begin) * (number + 1) / number > seconds:
            break
        for name, one in candidates.items():
            row = rows[name]
            if "cannot" in row:
                continue
            sample = attempt(row, partial(once, one.work, device, repeats[name]))
            if sample is None:
                continue
            took, row["bytes"] = sample
            if number == 0:  # the first sample says how long a call is
                repeats[name] = max(1, min(_MOST_REPEATS, int(_LONG_ENOUGH[device] / took)))
            elif number == 1 and repeats[name] > 1:
                row["seconds"].clear()  # of one short call, which stands only where slow rivals leave no time for more
            row["seconds"].append(took)
    yield rows
    for name, one in candidates.items():
        if one.check is not None and "cannot" not in rows[name]:
            errors = attempt(rows[name], one.check)
            if errors is not None:
                rows[name]["errors"] = errors
            yield rows


def attempt(row: dict[str, Any], what: Callable[[], Any]) -> Any:
    """What ``what`` gives, or None and a line in the row: running out of memory or a rival's own faults end nothing."""
    try:
        return what()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        row["cannot"] = f"{type(error).__name__}: {lines[0][:160]}"
    gc.collect()  # after the error, which held on to what it had
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def once(work: Callable[[], Any], device: str, repeats: int = 1) -> tuple[float, int]:
    """Seconds of a call, on average of ``repeats``, and the most bytes it held beside its inputs."""
    gpu = device == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if gpu else 0
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    if gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - begin) / repeats
    return seconds, (torch.cuda.max_memory_allocated() - before if gpu else 0)


def right(rows: Rows, *needed: str) -> bool:
    """Whether no error is above 1, and those who are needed could."""
    wrong = any(not error <= 1 for row in rows.values() for error in row.get("errors", {}).values())
    return not wrong and all("cannot" not in rows[name] for name in needed)
