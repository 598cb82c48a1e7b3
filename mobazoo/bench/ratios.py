"""How many times faster, round by round."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median


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
