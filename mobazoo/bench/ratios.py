"""How many times faster, round by round, and what that is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal


def ratios(rival: Sequence[float], ours: Sequence[float]) -> list[float]:
    """The rival's seconds over ours, each within its round, so that a machine whose speed drifts favours neither."""
    return [one / other for one, other in zip(rival, ours, strict=True)]


def speedup(rival: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Median and extremes of the ratios, as results have them.

    Example:
        >>> speedup([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
        {'speedup': 3.0, 'speedup_min': 2.0, 'speedup_max': 4.0}
    """
    found = ratios(rival, ours)
    return {"speedup": median(found), "speedup_min": min(found), "speedup_max": max(found)}


_MISSED = ": missed"


@dataclass(frozen=True)
class Bound:
    """What a ratio is held against: a number, or a share of another ratio where ``of`` names one.

    Example:
        >>> str(Bound(">=", 8.5)), str(Bound(">=", 0.95, note="exact")), str(Bound(">=", 0.9, of="float32's"))
        ('>= 8.5', '>= 0.95 (exact)', ">= 0.9 of float32's")
    """

    sign: Literal[">=", ">", "<="]
    value: float
    note: str = ""
    of: str = ""

    def __str__(self) -> str:
        of = f" of {self.of}" if self.of else ""
        return f"{self.sign} {self.value:g}{of}" + (f" ({self.note})" if self.note else "")

    def holds(self, ratio: float, other: float = 1.0) -> bool:
        """Whether ``ratio`` is within it; ``other`` is the ratio that ``of`` names."""
        limit = self.value * other
        return {">=": ratio >= limit, ">": ratio > limit, "<=": ratio <= limit}[self.sign]

    def verdict(self, ratio: float, other: float = 1.0) -> str:
        """It in words, with what became of it where it does not hold.

        Example:
            >>> Bound("<=", 1.5).verdict(1.2), Bound("<=", 1.5).verdict(1.6)
            ('<= 1.5', '<= 1.5: missed')
        """
        return str(self) if self.holds(ratio, other) else f"{self}{_MISSED}"


def is_missed(verdict: str) -> bool:
    """Whether a ``Bound.verdict``, or a line that ends with one, is of a bound that does not hold."""
    return verdict.endswith(_MISSED)
