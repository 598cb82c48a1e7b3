"""Rotary position embedding, rotate-half form (arXiv 2104.09864), with the scalings of long-context checkpoints."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mobazoo.errors import UnsupportedError

# Others change frequencies with the length of the call, or per layer: not in these families.
SCALINGS = ("linear", "llama3", "yarn")


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position, computed in float32.

    Raises:
        UnsupportedError: a rope type besides ``default``, ``linear``, ``llama3`` and ``yarn``.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        kind = config.rope_parameters["rope_type"]
        if kind == "default":
            exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
            frequencies, self.magnitude = config.rope_parameters["rope_theta"] ** -exponent, 1.0
        elif kind in SCALINGS:
            frequencies, self.magnitude = ROPE_INIT_FUNCTIONS[kind](config)
        else:
            raise UnsupportedError(f"rope type {kind!r} is not supported; known: default, {', '.join(SCALINGS)}")
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions ``[B, T]`` to cosines and sines ``[B, 1, T, D]`` in ``dtype``."""
        angle = position_ids[:, None, :, None].float() * self.inv_freq.float()
        angle = torch.cat((angle, angle), dim=-1)
        return (angle.cos() * self.magnitude).to(dtype), (angle.sin() * self.magnitude).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns ``x`` ``[B, H, T, D]`` by its positions' angles."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin
