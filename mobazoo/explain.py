"""What the attention rules of a model cost, from its config alone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import torch

from mobazoo.attention.auto import choose
from mobazoo.attention.backends import BACKENDS
from mobazoo.attention.pattern import Full, MoBA, Pattern
from mobazoo.attention.problem import Problem
from mobazoo.config.rules import LayerAttention


def keys_read(pattern: Pattern, length: int) -> int:
    """Keys that all queries of one document of ``length`` tokens read together, per query head.

    Exact: a query reads its own block up to itself and ``top_k - 1`` complete earlier ones, fewer where fewer are.
    With 4096 tokens, blocks of 512 and top 3 the query at 4000 reads ``4000 % 512 + 1 + 2 * 512`` keys.
    """
    if isinstance(pattern, Full):
        return length * (length + 1) // 2
    size, earlier = pattern.block_size, pattern.top_k - 1
    blocks, rest = divmod(length, size)
    few = min(blocks, earlier)  # blocks that have fewer than `earlier` before them
    chosen = few * (few - 1) // 2 + (blocks - few) * earlier
    own = blocks * (size * (size + 1) // 2) + rest * (rest + 1) // 2
    return own + chosen * size * size + rest * min(blocks, earlier) * size


def share_read(layers: Sequence[LayerAttention], length: int) -> Fraction:
    """Share of the keys full attention would read that a prefill of ``length`` tokens reads, mean over the layers."""
    read = sum(keys_read(layer.pattern, length) for layer in layers)
    return Fraction(read, len(layers) * keys_read(Full(), length))


def kv_bytes(layers: int, key_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a token adds to the cache."""
    return layers * 2 * key_heads * head_dim * dtype.itemsize


def centroid_bytes(layers: Sequence[LayerAttention], key_heads: int, head_dim: int, dtype: torch.dtype) -> Fraction:
    """Bytes of centroids that a token adds to the cache on average: one key a block and MoBA layer."""
    blocks = (layer.pattern.block_size for layer in layers if isinstance(layer.pattern, MoBA))
    return sum((Fraction(key_heads * head_dim * dtype.itemsize, size) for size in blocks), Fraction())


def backend_of(layer: LayerAttention, length: int, head_dim: int, dtype: torch.dtype, device: str) -> tuple[str, str]:
    """The backend that a prefill of ``length`` tokens takes in a layer, and why."""
    pattern = layer.pattern
    covered = isinstance(pattern, MoBA) and pattern.covers(length)
    asked = Full() if covered else pattern
    problem = Problem(asked, device, dtype, head_dim, grad=False, queries=length, slots=length)
    if layer.backend != "auto":
        module = BACKENDS.get(layer.backend)
        if module is None:
            return layer.backend, f"there is none of that name; known: {', '.join(BACKENDS)}"
        return layer.backend, module.unsupported(problem) or "named in the rules"
    name, why = choose(problem)
    return name, f"auto: {'its blocks cover the length, so full; ' if covered else ''}{why}"


def groups(layers: Sequence[LayerAttention]) -> list[tuple[str, int, LayerAttention]]:
    """Equal layers together: which (``0-28``, ``0-30 by 2``, ``0-3, 7``), how many, and what they are."""
    members: dict[LayerAttention, list[int]] = {}
    for number, layer in enumerate(layers):
        members.setdefault(layer, []).append(number)
    return [(_numbers(numbers), len(numbers), layer) for layer, numbers in members.items()]


def _numbers(numbers: list[int]) -> str:
    steps = {later - earlier for earlier, later in pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}-{numbers[-1]} by {steps.pop()}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
