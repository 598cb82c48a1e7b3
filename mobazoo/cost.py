"""How long attention takes: work counted exactly, times a rate that two short runs on this machine give."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from mobazoo.attention import Full, MoBA, Pattern, attend
from mobazoo.config.rules import LayerAttention
from mobazoo.explain import keys_read

# Multiply-adds of one score of the gate against one pair of attention: it is computed, sorted and looked at again.
_GATE = 4
_CALIBRATION = 4096  # tokens, or more where the blocks cover that
_LONGEST = 1 << 24


@dataclass(frozen=True)
class Shape:
    """One layer's attention.

    Attributes:
        heads: query heads.
        key_heads: key heads.
        head_dim: ``D``.
        dtype: of q, k and v.
        device: where it runs.
    """

    heads: int
    key_heads: int
    head_dim: int
    dtype: torch.dtype
    device: str


def gate_scores(pattern: Pattern, length: int) -> int:
    """Pairs of query and earlier complete block of one document, per query head; none where every block is read."""
    if isinstance(pattern, Full) or pattern.covers(length):
        return 0
    blocks, rest = divmod(length, pattern.block_size)
    return pattern.block_size * (blocks * (blocks - 1) // 2) + rest * blocks


def flops(pattern: Pattern, length: int, shape: Shape) -> int:
    """Floating-point operations of a prefill: two products a pair, and the gate's scores."""
    return 2 * shape.head_dim * shape.heads * (2 * keys_read(pattern, length) + gate_scores(pattern, length))


def traffic(pattern: Pattern, length: int, shape: Shape) -> int:
    """Bytes that have to be moved at the least: q, k, v and the output once, and for every routed block of a query the
    query again and a partial output."""
    one = length * shape.head_dim * shape.dtype.itemsize
    routed = 0 if isinstance(pattern, Full) or pattern.covers(length) else 2 * (pattern.top_k - 1)
    return one * ((2 + routed) * shape.heads + 2 * shape.key_heads)


def work(pattern: Pattern, length: int) -> float:
    """What the time of a prefill is taken to be proportional to, in pairs of query and key."""
    return keys_read(pattern, length) + gate_scores(pattern, length) * _GATE / 2


@dataclass(frozen=True)
class Rates:
    """Seconds for a pair of query and key, full and by blocks, all heads of one layer together."""

    full: float
    moba: float

    def seconds(self, pattern: Pattern, length: int) -> float:
        """Predicted for one layer; MoBA that reads everything is computed as full attention."""
        covered = isinstance(pattern, MoBA) and pattern.covers(length)
        dense = covered or isinstance(pattern, Full)
        return (self.full if dense else self.moba) * work(Full() if dense else pattern, length)

    def break_even(self, pattern: MoBA) -> int | None:
        """The shortest length, to an eighth, at which the prediction is faster than full attention."""
        length = pattern.block_size * pattern.top_k + 1
        while length < _LONGEST:
            if self.seconds(pattern, length) < self.seconds(Full(), length):
                return length
            length += max(1, length // 8)
        return None


def calibration(pattern: MoBA) -> int:
    """Tokens of the short runs: enough that the blocks do not cover them."""
    return max(_CALIBRATION, 2 * pattern.block_size * pattern.top_k)


def calibrate(pattern: MoBA, shape: Shape, rounds: int = 3) -> Rates:
    """Rates from short runs of a pattern and of full attention in turn on this machine."""
    length = calibration(pattern)
    full, moba = measure([Full(), pattern], length, shape, rounds)
    return Rates(full / work(Full(), length), moba / work(pattern, length))


def measure(patterns: Sequence[Pattern], length: int, shape: Shape, rounds: int) -> list[float]:
    """Median seconds of one layer's attention on random inputs, the patterns in turn after a warm-up."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        x = torch.randn(1, heads, length, shape.head_dim, generator=generator)
        return x.to(device=shape.device, dtype=shape.dtype)

    q, k, v = draw(shape.heads), draw(shape.key_heads), draw(shape.key_heads)
    times: list[list[float]] = [[] for _ in patterns]
    for number in range(rounds + 1):
        for pattern, took in zip(patterns, times, strict=True):
            begin = time.perf_counter()
            attend(q, k, v, pattern=pattern)[0, 0, -1, 0].item()  # .item() waits for the device
            if number:
                took.append(time.perf_counter() - begin)
    return [median(took) for took in times]


def layer_patterns(layers: Sequence[LayerAttention]) -> dict[Pattern, int]:
    """Patterns, and how many layers have them."""
    found: dict[Pattern, int] = {}
    for layer in layers:
        found[layer.pattern] = found.get(layer.pattern, 0) + 1
    return found
