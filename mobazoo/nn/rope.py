"""Rotary position embedding, rotate-half form (arXiv 2104.09864), with the scalings of long-context checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, pi

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mobazoo.config.rope import RopeStep, rope_steps
from mobazoo.errors import UnsupportedError

# Others change frequencies with the length of the call, or per layer: not in these families.
SCALINGS = ("linear", "llama3", "yarn")
# Turns within the old context above which yarn leaves a frequency alone, and below which it divides it (its defaults).
_FAST, _SLOW = 32.0, 1.0


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position, computed in float32.

    Raises:
        UnsupportedError: a rope type besides ``default``, ``linear``, ``llama3`` and ``yarn``, or one that turns only a
            part of each head.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        frequencies, self.magnitude = inverse_frequencies(config)
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def reset(self) -> None:
        """Computes the frequencies again, in place: what was made on ``meta`` holds none."""
        with torch.device("cpu"):
            frequencies, _ = inverse_frequencies(self.config)
        with torch.no_grad():
            self.inv_freq.copy_(frequencies)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Moves devices only: frequencies rounded to 16 bits would turn far positions by other angles."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != exact.dtype:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions ``[B, T]`` to cosines and sines ``[B, 1, T, D]`` in ``dtype``."""
        angle = position_ids[:, None, :, None].float() * self.inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        return (angle.cos() * self.magnitude).to(dtype), (angle.sin() * self.magnitude).to(dtype)


def inverse_frequencies(config: PreTrainedConfig) -> tuple[Tensor, float]:
    """Angle per position of each pair of channels, float32 ``[D / 2]``, and the factor on cosines and sines."""
    return extend(*_stored_frequencies(config), rope_steps(config.__dict__.get("moba")))


def extend(frequencies: Tensor, magnitude: float, steps: Sequence[RopeStep]) -> tuple[Tensor, float]:
    """Frequencies ``[D / 2]`` and their magnitude for longer contexts, step by step.

    ``linear`` divides all frequencies. ``yarn`` (arXiv 2309.00071, "NTK-by-parts") divides those that do not turn once
    in the old context, leaves those that turn 32 times or more, and blends in between by the logarithm of the turns;
    over a plain rope that is transformers' ``yarn`` with ``truncate: false``. Counting turns of the frequencies as they
    are gives it a meaning over ``llama3`` and others too.
    """
    for step in steps:
        if step.type == "linear":
            frequencies = frequencies / step.factor
        else:
            turns = frequencies * (step.original_max_position_embeddings / (2 * pi))
            kept = ((turns / _SLOW).log() / log(_FAST / _SLOW)).clamp(0, 1)
            frequencies = frequencies * (kept + (1 - kept) / step.factor)
            magnitude *= 0.1 * log(step.factor) + 1
    return frequencies, magnitude


def _stored_frequencies(config: PreTrainedConfig) -> tuple[Tensor, float]:
    rope = config.rope_parameters
    kind = rope["rope_type"]
    part = rope.get("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise UnsupportedError(
            f"rope with partial_rotary_factor={part} is not supported: these families turn whole heads"
        )
    if kind == "default":
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / rope["rope_theta"] ** exponent, 1.0
    if kind in SCALINGS:
        frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](config)
        return frequencies.float(), magnitude
    raise UnsupportedError(f"rope type {kind!r} is not supported; known: default, {', '.join(SCALINGS)}")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns ``x`` ``[B, H, T, D]`` by its positions' angles ``[B, 1, T, D]``."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin
