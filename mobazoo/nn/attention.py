"""The attention layer of Llama and Qwen over ``attend``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from mobazoo.attention import Full, Pattern, attend
from mobazoo.config.rules import LayerAttention
from mobazoo.nn.geometry import Geometry
from mobazoo.nn.kconv import KeyConv
from mobazoo.nn.norm import RMSNorm
from mobazoo.nn.rope import rotate

NAIVE = "moba_naive"


class Attention(nn.Module):
    """Separate q, k, v projections, optional q/k norm before RoPE, optional key convolution, any pattern.

    ``layer`` says what is computed and by which backend; changing it changes no weight. Under
    ``attn_implementation="moba_naive"`` the backend is ``reference``.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        number: int,
        layer: LayerAttention,
        *,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        self.config = config
        self.number = number
        self.layer = layer
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden, key_heads * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden, key_heads * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=out_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_conv = KeyConv(key_heads, self.head_dim, layer.kconv) if layer.kconv else None

    def forward(self, x: Tensor, geometry: Geometry, cache: Cache | None) -> Tensor:
        """``[B, T, hidden]`` in and out; ``cache`` gets the new keys and values."""
        q, k, v = self.project(x, geometry)
        if cache is not None:
            k, v = cache.update(k, v, self.number)
        return self.o_proj(self._attend(q, k, v, geometry).transpose(1, 2).flatten(2))

    def project(self, x: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, T, hidden]`` to ``q [B, Hq, T, D]`` and ``k, v [B, Hkv, T, D]`` as ``attend`` gets them, rotated."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))  # [B, H, T, D]
        own = slice(None)
        if geometry.sequence is not None:
            k, v = geometry.sequence.gather(k), geometry.sequence.gather(v)  # [B, Hkv, S, D]
            own = geometry.sequence.part(k.shape[2])
        if self.k_conv is not None:
            k = self.k_conv(k, geometry.segments.pos)
        q = rotate(q, geometry.cos[:, :, own], geometry.sin[:, :, own])
        k = rotate(k, geometry.cos, geometry.sin)
        return q.to(v.dtype), k.to(v.dtype), v  # autocast leaves norms and rotation in float32

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
        """Queries before ``decode_from`` use the layer's pattern, later ones its decode pattern."""
        length, first = q.shape[2], geometry.q_start
        split = length
        if geometry.decode_from is not None and self.layer.decode_pattern != self.layer.pattern:
            split = _prompt_part(length, first, geometry.decode_from)
        parts = []
        if split:
            parts.append(self._attend_one(q[:, :, :split], k, v, geometry, self.layer.pattern, first))
        if split < length:
            pattern = self.layer.decode_pattern
            parts.append(self._attend_one(q[:, :, split:], k, v, geometry, pattern, first + split))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _attend_one(
        self, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, pattern: Pattern, q_start: int | Tensor
    ) -> Tensor:
        # A backend is chosen for the layer's pattern; what a full decode step uses is for `auto` to know.
        backend = "auto" if isinstance(pattern, Full) and pattern != self.layer.pattern else self.layer.backend
        if self.config._attn_implementation == NAIVE:
            backend = "reference"
        return attend(q, k, v, pattern=pattern, backend=backend, segments=geometry.segments, q_start=q_start)


def _prompt_part(length: int, q_start: int | Tensor, decode_from: int) -> int:
    """How many of ``length`` queries stand before ``decode_from``.

    Inside a compiled graph ``q_start`` of a static cache is unknown: one token is decoding there, and so a prompt whose
    last compiled chunk is one token has that token decoded.
    """
    if isinstance(q_start, Tensor):
        return 0 if length == 1 else length
    return min(max(decode_from - q_start, 0), length)
