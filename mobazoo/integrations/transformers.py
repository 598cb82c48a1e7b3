"""MoBA as an attention implementation of stock transformers models: ``attn_implementation="moba"``.

transformers asks a mask function once per forward and hands its result to the attention function of every layer. Ours
is compact, int32 ``[B, 1, R, S]``: row 0 holds each slot's position in its document or -1 at padding, row 1 the slot of
the first query. ``R = 1`` says that nothing is padded or cached, so rows are whole. O(S), and it passes untouched where
``generate`` prepares masks ahead of the forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from mobazoo.attention import Segments, attend
from mobazoo.config.rules import LayerAttention, parse_rules, resolve
from mobazoo.errors import InputError, UnsupportedError

# What transformers passes to every attention function and that changes nothing here.
_HARMLESS = frozenset({"use_cache", "num_items_in_batch", "output_hidden_states", "return_dict", "cache_position"})
# What would change the result: taken only where it asks for nothing.
_NEUTRAL = {"dropout": 0.0, "is_causal": True, "sliding_window": None, "softcap": None, "s_aux": None}


def moba_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor:
    """The compact mask of a forward; called by transformers.

    Raises:
        UnsupportedError: a mask that is not causal attention inside documents.
    """
    packed = getattr(mask_function, "__qualname__", "").startswith(
        "and_masks"
    )  # packed position_ids; others say so by use_vmap or local_size
    if local_size is not None or use_vmap or kv_offset or not (packed or mask_function is causal_mask_function):
        raise UnsupportedError(
            "attn_implementation='moba' knows causal masks, padding and packed position_ids only; this model asks for "
            "a sliding window or a mask of its own"
        )
    slot = torch.arange(kv_length, dtype=torch.int32, device=device).expand(batch_size, kv_length)
    whole = isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    if attention_mask is None:
        pos = slot
    else:
        if attention_mask.dim() != 2:
            raise UnsupportedError(
                f"attn_implementation='moba' wants a [B, S] padding mask, got shape {list(attention_mask.shape)}"
            )
        # Slots a static cache has not written belong to the open document: causality hides them.
        real = nn.functional.pad(attention_mask.bool(), (0, kv_length - attention_mask.shape[1]), value=True)
        first = torch.where(real, slot, kv_length).amin(1, keepdim=True)
        pos = torch.where(real, slot - first, -1)
        whole = False
    if whole:
        return pos[:, None, None]
    return torch.stack([pos, torch.zeros_like(pos) + q_offset], dim=1)[:, None]


def moba_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer by the rules in ``config.moba``; called by transformers. Output ``[B, T, Hq, D]``."""
    return _attention(module, query, key, value, attention_mask, scaling, position_ids, options, backend=None)


def moba_naive_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The same by the ``reference`` backend."""
    return _attention(module, query, key, value, attention_mask, scaling, position_ids, options, backend="reference")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    position_ids: Tensor | None,
    options: dict[str, Any],
    backend: str | None,
) -> tuple[Tensor, None]:
    _refuse(options)
    layer = layer_attention(module)
    segments, q_start = _geometry(attention_mask, position_ids, query, key)
    # A stock model cannot say where its prompt ended: one token on a cache that is not empty is decoding.
    decoding = query.shape[2] == 1 and key.shape[2] > 1
    out = attend(
        query,
        key,
        value,
        pattern=layer.decode_pattern if decoding else layer.pattern,
        backend=backend or ("auto" if decoding else layer.backend),
        segments=segments,
        q_start=q_start,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


def _refuse(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in _HARMLESS or (name in _NEUTRAL and value in (_NEUTRAL[name], None)) or value is False:
            continue
        raise UnsupportedError(f"attn_implementation='moba' cannot honour {name}={value!r}; turn it off")


def layer_attention(module: nn.Module) -> LayerAttention:
    """What ``config.moba`` says for an attention module of a transformers model.

    Raises:
        InputError: no rules in the config, or rules that do not resolve.
    """
    config: Any = module.config
    moba = config.moba if "moba" in config.__dict__ else None
    if not isinstance(moba, dict) or not moba.get("attention"):
        raise InputError(
            "attn_implementation='moba' needs rules in the config: "
            "set config.moba = {'attention': [{'pattern': 'moba', 'block_size': ..., 'top_k': ...}]}"
        )
    number: Any = module.layer_idx
    layer = resolve(parse_rules(moba["attention"], "moba.attention"), config.num_hidden_layers)[number]
    if layer.kconv:
        raise UnsupportedError("kconv adds weights that a stock model does not have; convert to a zoo checkpoint")
    return layer


def _geometry(
    mask: Tensor | None, position_ids: Tensor | None, query: Tensor, key: Tensor
) -> tuple[Segments, int | Tensor | None]:
    batch, slots = key.shape[0], key.shape[2]
    square = query.shape[2] == slots
    if mask is None or mask.dim() != 4 or mask.dtype != torch.int32 or mask.shape[3] != slots:
        got = None if mask is None else f"{list(mask.shape)} {mask.dtype}"
        raise UnsupportedError(
            f"attn_implementation='moba' was given a foreign mask: {got}; pass a [B, S] padding mask"
        )
    if mask.shape[2] == 1:
        if position_ids is None or not square:
            return Segments.single(batch, slots, key.device), None
        bounds = (None, None) if key.device.type == "cpu" else (slots, slots)
        return Segments.from_position_ids(position_ids.expand(batch, slots), None, *bounds), None
    pos = mask[:, 0, 0].expand(batch, slots)
    doc = torch.where(pos >= 0, 0, -1).to(torch.int32)
    return Segments(doc, pos.clamp(min=0), max_docs=1, max_len=slots), mask[0, 0, 1, 0]
