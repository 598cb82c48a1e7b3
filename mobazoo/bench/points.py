"""A point of a sweep: what is computed there, how much work and memory it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from mobazoo.attention import Full, MoBA
from mobazoo.config.sweep import Blocks, SweepRecipe
from mobazoo.cost import work
from mobazoo.explain import keys_read

# Bytes a pair of query and key of the naive way, from above: scores three times over in float32, and masks. The column
# "peak" of `mobazoo bench moba-paper lengths='[8192]' modes='[train, prefill]'` has 12 and 14.
_NAIVE = {"prefill": 14, "train": 18, "decode": 14}
_TILE = 128


@dataclass(frozen=True)
class Point:
    """One mode, dtype, setting and length of a recipe."""

    recipe: SweepRecipe
    mode: str
    dtype: str
    blocks: Blocks
    length: int

    @property
    def pattern(self) -> MoBA:
        """The setting at this length."""
        return self.blocks.pattern(self.length)

    def at(self, length: int) -> Point:
        """The same at another length, its blocks as large as here."""
        pattern = self.pattern
        return replace(self, length=length, blocks=Blocks(pattern.top_k, pattern.block_size))

    def said(self) -> dict[str, Any]:
        """What names it in a result."""
        pattern = self.pattern
        here = {"mode": self.mode, "dtype": self.dtype, "length": self.length}
        return {**here, "block_size": pattern.block_size, "top_k": pattern.top_k, "count": self.blocks.count}

    def pairs(self, name: str) -> float:
        """What the time of a contender is taken to be proportional to."""
        pattern, dense = self.pattern, name in ("sdpa", "flash-attn")
        if self.mode == "decode":
            return self.length if dense else min(self.length, pattern.top_k * pattern.block_size) + self.length / 64
        if name == "naive":
            return self.length**2
        return keys_read(Full(), self.length) if dense else work(pattern, self.length)

    def bytes_needed(self, name: str) -> int:
        """Inputs, outputs, gradients and what a contender makes besides, roughly and from above."""
        recipe, size = self.recipe, getattr(torch, self.dtype).itemsize
        queries = 1 if self.mode == "decode" else self.length
        rows = recipe.batch * recipe.query_heads * queries
        tensors = 2 * size * recipe.head_dim * (rows + recipe.batch * recipe.key_heads * self.length)
        need = tensors * (2 if self.mode == "train" else 1)
        if name == "naive":
            return need + _NAIVE[self.mode] * rows * self.length
        if not name.startswith("MoBA, "):
            return need
        need += 4 * rows * (2 * self.pattern.top_k + recipe.head_dim)  # the choice, and outputs in float32
        if name.endswith(("flex", "flex_routed")):
            need += 16 * rows * self.length // _TILE**2
        return need + (_NAIVE[self.mode] * rows * self.length if name.endswith("reference") else 0)
