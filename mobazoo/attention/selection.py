"""The few largest scores of every query, and which they are."""

from __future__ import annotations

import torch
from torch import Tensor

# Neighbours of whom only the largest takes part in a first round, and scores of a query for which one round is less
# work than two.
RUN = 4
_ONE_ROUND = 64
# Queries from which a CPU compares whole rows of them, and the most that may be chosen there.
_LEAST_QUERIES = 1024
_MOST_CHOSEN = 16

_SMALLEST = -(1 << 63)  # below every key of a score
_NUMBER = (1 << 32) - 1  # the part of a key that holds its number


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
        return _first(_keys(scores, torch.arange(n, device=scores.device)[:, None], k), k)
    # The k largest lie in the k runs with the largest maxima, and maxima are far cheaper than a selection.
    maxima = scores.unflatten(1, (-1, RUN)).amax(2)
    runs = _first(_keys(maxima, torch.arange(n // RUN, device=scores.device)[:, None], k), k).mul_(RUN)
    number = torch.cat([runs + place for place in range(RUN)], 1)
    return _first(_keys(scores.gather(1, number), number, k), k)


def _keys(scores: Tensor, number: Tensor, k: int) -> Tensor:
    """int64 keys that sort as (score, number) do, filled up with the smallest to lists of ``_length(k)``.

    The high word is the float32 score as an integer of the same order (-0.0 equals 0.0), the low word the number.
    """
    bits = scores.view(torch.int32)
    sign = bits >> 31  # 0 or -1
    order = (bits & 0x7FFFFFFF).bitwise_xor_(sign).sub_(sign)
    heads, n, queries = scores.shape
    keys = torch.empty(heads, n + -n % _length(k), queries, dtype=torch.int64, device=scores.device)
    keys[:, n:] = _SMALLEST
    torch.add(number, order, alpha=1 << 32, out=keys[:, :n])
    return keys


def _length(k: int) -> int:
    """A power of two that is at least ``k``."""
    return 1 << (k - 1).bit_length()


def _first(keys: Tensor, k: int) -> Tensor:
    """Numbers of the ``k`` largest keys: ``[h, N, c]``, overwritten, -> ``[h, k, c]``."""
    heads, _, queries = keys.shape
    if keys.device.type != "cpu" or heads * queries < _LEAST_QUERIES or k > _MOST_CHOSEN:
        return keys.mT.topk(k, dim=-1).values.mT & _NUMBER
    # Torch selects for one query after the other; a sorting network compares all queries' keys at once.
    length = _length(k)
    lists = keys.unflatten(1, (length, -1))  # [h, length, lists, c]
    _sort(lists)
    while lists.shape[2] > 1:
        lists = _merge(lists)
    return lists[:, :k, 0] & _NUMBER


def _sort(lists: Tensor) -> None:
    """Sorts lists ``[h, length, lists, c]`` in place, largest first (Batcher's odd-even merge sort)."""
    width = 2
    while width <= lists.shape[1]:
        halves = lists.unflatten(1, (-1, width))  # [h, length / width, width, lists, c], each half sorted
        _exchange(halves, width // 2)
        step = width // 4
        while step:
            _exchange(halves[:, :, step : width - step], step)
            step //= 2
        width *= 2


def _exchange(lists: Tensor, step: int) -> None:
    """Brings pairs ``step`` apart in the third dimension into order, in place."""
    high, low = lists.unflatten(2, (-1, 2, step)).unbind(3)
    higher = torch.maximum(high, low)
    torch.minimum(high, low, out=low)
    high.copy_(higher)


def _merge(lists: Tensor) -> Tensor:
    """The larger halves of pairs of sorted lists, sorted: half as many lists, the middle one of an odd number kept."""
    _, length, count, _ = lists.shape
    pairs = count // 2
    reversed_ = lists[:, :, count - pairs :].flip(1)
    lists = lists[:, :, : count - pairs]
    # One list against another reversed: the larger ones rise and then fall, so that halving steps sort them.
    torch.maximum(lists[:, :, :pairs], reversed_, out=lists[:, :, :pairs])
    spare = torch.empty_like(lists, memory_format=torch.contiguous_format)
    step = length // 2
    while step:
        high, low = lists.unflatten(1, (-1, 2, step)).unbind(2)
        higher, lower = spare.unflatten(1, (-1, 2, step)).unbind(2)
        torch.maximum(high, low, out=higher)
        torch.minimum(high, low, out=lower)
        lists, spare = spare, lists
        step //= 2
    return lists
