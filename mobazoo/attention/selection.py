"""The few blocks with the largest scores of every query."""

from __future__ import annotations

import torch
from torch import Tensor

# Neighbours of whom only the largest takes part in a first round, and scores of a query for which one round is less
# work than two.
RUN = 4
_ONE_ROUND = 64

_NUMBER = (1 << 32) - 1  # the part of a key that holds its number


def choose(scores: Tensor, first: Tensor, stop: Tensor, before: int, index: Tensor) -> None:
    """Writes the best-scoring blocks of queries that may choose among more than there is place for.

    Best first; among equal scores the later block wins. NaN and minus infinity count as the lowest number.

    Args:
        scores: ``[h, N, G, t]`` float32, contiguous, ``N`` a multiple of ``RUN``; may be overwritten.
        first: ``[t]`` int32: a query may choose among blocks ``first .. stop - 1``, for which ``0 <= first`` and
            ``stop <= N`` hold.
        stop: ``[t]``.
        before: what a block's number is more than its place in ``scores``.
        index: ``[h, G, t, k]`` int16 or int32; places of a query lie together, and its queries one after the other.
    """
    _hide(scores, first, stop)
    best = largest(scores.flatten(2), index.shape[3]).add_(before)
    best = best.unflatten(2, scores.shape[2:]).permute(0, 2, 3, 1)
    index.copy_(torch.where((stop - first > index.shape[3])[:, None], best, index))


def _hide(scores: Tensor, first: Tensor, stop: Tensor) -> None:
    """Puts blocks outside each query's ``first .. stop - 1`` below all others; scores ``[h, n, G, t]``."""
    lowest = torch.finfo(scores.dtype).min  # what no number is, or too low for one, is still above a hidden block
    scores.nan_to_num_(lowest, neginf=lowest)
    n = scores.shape[1]
    # On a CPU it may be asked which blocks are outside for nobody.
    certain, shut = (int(first[-1]), max(0, int(stop[0]))) if scores.device.type == "cpu" else (n, 0)
    number = torch.arange(n, device=scores.device)[:, None]
    if certain > 0:
        scores[:, :certain].masked_fill_((number[:certain] < first)[:, None], -torch.inf)
    if shut < n:
        scores[:, shut:].masked_fill_((number[shut:] >= stop)[:, None], -torch.inf)


def largest(scores: Tensor, k: int) -> Tensor:
    """Numbers of the ``k`` largest scores, largest first; among equal ones the higher number wins.

    Args:
        scores: ``[h, N, c]`` float32 without NaN, of ``c`` queries; ``N`` a multiple of ``RUN``.
        k: how many, at most ``N``.

    Returns:
        ``[h, k, c]`` int64.
    """
    n = scores.shape[1]
    if n <= max(_ONE_ROUND, 2 * RUN * k):
        return _first(scores, torch.arange(n, device=scores.device)[:, None], k)
    # The k largest lie in the k runs with the largest maxima, and maxima are far cheaper than a selection.
    maxima = scores.unflatten(1, (-1, RUN)).amax(2)
    runs = _first(maxima, torch.arange(n // RUN, device=scores.device)[:, None], k).mul_(RUN)
    number = torch.cat([runs + place for place in range(RUN)], 1)
    return _first(scores.gather(1, number), number, k)


def _first(scores: Tensor, number: Tensor, k: int) -> Tensor:
    """Numbers of the ``k`` largest: ``[h, N, c]`` and ``number``, which broadcasts to it -> ``[h, k, c]``."""
    return _keys(scores, number).mT.topk(k, dim=-1).values.mT & _NUMBER


def _keys(scores: Tensor, number: Tensor) -> Tensor:
    """int64 keys that sort as (score, number) do.

    The high word is the float32 score as an integer of the same order (-0.0 equals 0.0), the low word the number.
    """
    bits = scores.view(torch.int32)
    sign = bits >> 31  # 0 or -1
    order = (bits & 0x7FFFFFFF).bitwise_xor_(sign).sub_(sign)
    return torch.add(number, order, alpha=1 << 32)
