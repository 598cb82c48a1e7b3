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


@dataclass(frozen=True)
class Verdict:
    """A bound in words (empty: there is none), and whether it is missed."""

    bound: str = ""
    missed: bool = False

    def __str__(self) -> str:
        return f"{self.bound}: missed" if self.missed else self.bound


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

    def verdict(self, ratio: float, other: float = 1.0) -> Verdict:
        """What becomes of it with ``ratio``; ``other`` is the ratio that ``of`` names.

        Example:
            >>> str(Bound("<=", 1.5).verdict(1.2)), str(Bound("<=", 1.5).verdict(1.6))
            ('<= 1.5', '<= 1.5: missed')
        """
        limit = self.value * other
        holds = {">=": ratio >= limit, ">": ratio > limit, "<=": ratio <= limit}[self.sign]
        return Verdict(str(self), not holds)
