"""What a machine can do: memory that is free, memory that a call takes, and how long a call may last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mobazoo.bench.points import Point
from mobazoo.checkpoint.memory import available_memory

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Limits:
    """Seconds a pair of each contender at its longest length so far, by mode and dtype.

    Args:
        longest: seconds that a call may be predicted to take.
    """

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self._rates: dict[tuple[str, str, str, int], float] = {}

    def unknown(self, point: Point, name: str) -> bool:
        """Whether nothing was timed yet."""
        return _key(point, name) not in self._rates

    def learn(self, point: Point, name: str, seconds: float) -> None:
        """Keeps a time."""
        self._rates[_key(point, name)] = seconds / point.pairs(name)

    def too_slow(self, point: Point, name: str) -> str | None:
        """Why a contender is left out, if it would take too long; one without a time is not."""
        seconds = self._rates.get(_key(point, name), 0.0) * point.pairs(name)
        if seconds <= self.longest:
            return None
        return f"would take about {seconds:.3g} s a call, longest is {self.longest:g} s"


def _key(point: Point, name: str) -> tuple[str, str, str, int]:
    return point.mode, point.dtype, name, point.pattern.top_k


def available(device: str) -> int | None:
    """Bytes that can be had now; None where the system does not say."""
    if device.startswith("cuda"):
        free: int = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return available_memory()


def peak_of(call: Callable[[], Any], device: str) -> int | None:
    """Calls, and says how many bytes it took beyond those in use before; None where the system does not say."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    anew = False
    with suppress(OSError):
        _REFERENCES.write_text("5")  # the peak begins anew (Linux)
        anew = True
    begin = _resident("VmRSS")
    call()
    end = _resident("VmHWM")
    return max(0, end - begin) if anew and begin is not None and end is not None else None


def _resident(what: str) -> int | None:
    with suppress(OSError, StopIteration):
        lines = _STATUS.read_text("utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{what}:")).split()[1])
    return None
