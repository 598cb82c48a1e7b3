"""The attention layer of Llama and Qwen over ``attend``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from mobazoo.attention import Centroids, Full, MoBA, Pattern, attend
from mobazoo.attention.backends import decode
from mobazoo.attention.gates import gate_of
from mobazoo.attention.routing import query_slots, route_by
from mobazoo.config.rules import LayerAttention
from mobazoo.errors import UnsupportedError
from mobazoo.nn.cache import MobaCache
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
        q, k, v = self.project(x, geometry, cache)
        known = None
        if isinstance(cache, MobaCache):
            pattern = self.layer.pattern
            kept = cache.update(k, v, self.number, pattern.block_size if isinstance(pattern, MoBA) else 0)
            k, v = self._learnable(kept, (k, v), geometry.q_start)
            known = cache.centroids(self.number) if isinstance(pattern, MoBA) else None
        elif cache is not None:
            k, v = cache.update(k, v, self.number)
        return self.o_proj(self._attend(q, k, v, known, geometry).transpose(1, 2).flatten(2))

    def project(self, x: Tensor, geometry: Geometry, cache: Cache | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, T, hidden]`` to ``q [B, Hq, T, D]`` and ``k, v [B, Hkv, T, D]`` as ``attend`` gets them, rotated.

        A ``cache`` gives a key convolution the raw keys before these, and keeps these.
        """
        q, k, v = (self._heads(part) for part in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))  # [B, H, T, D]
        own = slice(None)
        if geometry.sequence is not None:
            k, v = geometry.sequence.gather(k), geometry.sequence.gather(v)  # [B, Hkv, S, D]
            own = geometry.sequence.part(k.shape[2])
        if self.k_conv is not None:
            whole = geometry.sequence is not None
            k = self.k_conv(k, geometry.segments.pos) if whole else self._convolve(self.k_conv, k, geometry, cache)
        q = rotate(q, geometry.cos[:, :, own], geometry.sin[:, :, own])
        k = rotate(k, geometry.cos, geometry.sin)
        return q.to(v.dtype), k.to(v.dtype), v  # autocast leaves norms and rotation in float32

    def _heads(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.head_dim:
            raise UnsupportedError(
                f"tensor parallelism: {self.config.num_key_value_heads} key heads do not divide over the processes; "
                "take a number of them that does"
            )
        return x.unflatten(-1, (-1, self.head_dim))

    @staticmethod
    def _learnable(
        kept: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], past: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the cache holds; where a backward may follow, with the new tokens themselves and their history."""
        if not torch.is_grad_enabled() or not new[0].requires_grad or isinstance(past, Tensor):
            return kept
        k, v = (torch.cat([old[:, :, :past].to(x.device), x], dim=2) for old, x in zip(kept, new, strict=True))
        return k, v

    def _convolve(self, conv: KeyConv, k: Tensor, geometry: Geometry, cache: Cache | None) -> Tensor:
        pos = geometry.segments.pos
        if k.shape[2] < pos.shape[1]:  # new tokens on a cache
            pos = pos[:, query_slots(geometry.segments, k.shape[2], geometry.q_start)]
        before = cache.layers[self.number].raw_before(k) if isinstance(cache, MobaCache) else None
        return conv(k, pos, before)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, known: Centroids | None, geometry: Geometry) -> Tensor:
        """Queries of the prompt use the layer's pattern, later ones its decode pattern."""
        length, first = q.shape[2], geometry.q_start
        split = geometry.prompt if self.layer.decode_pattern != self.layer.pattern else length
        parts = []
        if split:
            parts.append(self._attend_one(q[:, :, :split], k, v, known, geometry, self.layer.pattern, first))
        if split < length:
            pattern = self.layer.decode_pattern
            parts.append(self._attend_one(q[:, :, split:], k, v, known, geometry, pattern, first + split))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _attend_one(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        known: Centroids | None,
        geometry: Geometry,
        pattern: Pattern,
        q_start: int | Tensor,
    ) -> Tensor:
        # A backend is chosen for the layer's pattern; what a full decode step uses is for `auto` to know.
        backend = "auto" if isinstance(pattern, Full) and pattern != self.layer.pattern else self.layer.backend
        if self.config._attn_implementation == NAIVE:
            backend = "reference"
        segments, routes = geometry.segments, None
        if isinstance(pattern, MoBA) and known is not None and not pattern.covers(segments.max_len):
            pattern = MoBA(pattern.block_size, min(pattern.top_k, segments.length // pattern.block_size + 1))
            routes = route_by(gate_of(backend, q, pattern), q, known, pattern, segments, q_start)
            if k.device != q.device and q.shape[2] <= decode.FEW:  # offloaded: only what is read moves
                scale = q.shape[3] ** -0.5
                return decode.run(q, k, v, segments=segments, routes=routes, q_start=q_start, scale=scale)
        k, v = k.to(q.device), v.to(q.device)
        return attend(q, k, v, pattern=pattern, backend=backend, segments=segments, routes=routes, q_start=q_start)
