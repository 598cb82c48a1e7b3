"""MoBA as an attention implementation of stock transformers models: ``attn_implementation="moba"``.

transformers asks a mask function once per forward and hands its result to the attention function of every layer. Ours
is compact, int32 ``[B, 1, R, S]``, and passes untouched where ``generate`` prepares masks ahead of the forward:

- ``R = 0``: every slot is a token, and the queries are the last ``T``;
- ``R = 1``: row 0 is each slot's position in its document, or -1 at padding;
- ``R = 2``: row 1 is the slot of the first query, for caches with slots that are not written yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.masking_utils import and_masks, causal_mask_function

from mobazoo.attention import Segments, attend
from mobazoo.config.rope import rope_steps
from mobazoo.config.rules import LayerAttention, moba_rules, resolve_layer
from mobazoo.errors import InputError, UnsupportedError

# What transformers passes to attention functions and that changes nothing here.
_HARMLESS = frozenset({"use_cache", "num_items_in_batch", "output_hidden_states", "return_dict", "cache_position"})
# What would change the result: taken only where it asks for nothing.
_NEUTRAL = {"dropout": 0.0, "is_causal": True}
# Attribute of a mask that holds the documents its forward's layers share.
_MADE = "mobazoo_segments"


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
        InputError: padding between the tokens of a row.
        UnsupportedError: a mask that is not causal attention inside documents.
    """
    # transformers joins the mask of packed rows to the causal one; what else it joins says so by the other arguments.
    joined = mask_function.__qualname__.startswith(f"{and_masks.__name__}.")
    if local_size is not None or use_vmap or kv_offset or not (joined or mask_function is causal_mask_function):
        raise UnsupportedError(
            "attn_implementation='moba' knows causal masks, padding and packed position_ids; this model asks for a "
            "sliding window or a mask of its own"
        )
    at_end = isinstance(q_offset, int) and q_offset + q_length == kv_length
    # Slots a static cache has not written belong to the open document: causality hides them.
    real = (
        None
        if attention_mask is None
        else pad(attention_mask.bool(), (0, kv_length - attention_mask.shape[1]), value=True)
    )
    if real is not None and not torch.compiler.is_compiling() and _no_padding(real):
        real = None
    if real is None and at_end:
        return torch.empty(batch_size, 1, 0, kv_length, dtype=torch.int32, device=device)
    slot = torch.arange(kv_length, dtype=torch.int32, device=device).expand(batch_size, kv_length)
    if real is not None:
        first = torch.where(real, slot, kv_length).amin(1, keepdim=True)
        slot = torch.where(real, slot - first, -1)
    rows = [slot] if at_end else [slot, (torch.zeros_like(slot) + q_offset).to(torch.int32)]
    return torch.stack(rows, dim=1)[:, None]


def _no_padding(real: Tensor) -> bool:
    """Whether ``real`` [B, S] has no padding; one wait for the device per forward, as in transformers' own masks."""
    ends = (real[:, 1:] != real[:, :-1]).sum(1) + (real[:, 0] != 0) + (real[:, -1] != 0)
    full, most = torch.stack([real.all(), ends.amax()]).tolist()
    if most > 2:
        raise InputError(
            "attention_mask: a row has padding between its tokens; attn_implementation='moba' takes left and right "
            "padding, and packed rows by position_ids without an attention_mask"
        )
    return bool(full)


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
    """Attention of one layer by the rules in ``config.moba``; called by transformers.

    Args:
        module: the attention module, with ``config`` and ``layer_idx``.
        query: ``[B, Hq, T, D]``, rotated.
        key: ``[B, Hkv, S, D]``, rotated, with the cache's.
        value: ``[B, Hkv, S, D]``.
        attention_mask: what ``moba_mask`` made.
        scaling: of the scores (None: ``D ** -0.5``).
        position_ids: ``[B, T]``; where no cache is before them they restart at 0 with every packed document.
        **options: whatever else the model passes; anything that would change the result is refused.

    Returns:
        ``[B, T, Hq, D]``, and no weights.

    Raises:
        InputError: no rules in the config, or documents that are not contiguous.
        UnsupportedError: what MoBA here cannot honour, by name.
    """
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
    """``moba_attention`` by the ``reference`` backend, whatever the rules say."""
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
    _refuse(module, options)
    layer = layer_attention(module)
    mask = _own_mask(attention_mask, key.shape[2])
    # A stock model cannot say where its prompt ended: one token on a cache that is not empty is decoding.
    decoding = query.shape[2] == 1 and key.shape[2] > 1
    out = attend(
        query,
        key,
        value,
        pattern=layer.decode_pattern if decoding else layer.pattern,
        backend=backend or ("auto" if decoding else layer.backend),
        segments=_segments(mask, position_ids, query, key),
        q_start=mask[0, 0, 1, 0] if mask.shape[2] == 2 else None,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, options: dict[str, Any]) -> None:
    config: Any = module.config
    if config.output_attentions:
        options = {**options, "output_attentions": True}
    for name, value in options.items():
        nothing = value == _NEUTRAL[name] if name in _NEUTRAL else value is False
        if name in _HARMLESS or value is None or nothing:
            continue
        shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise UnsupportedError(f"attn_implementation='moba' cannot honour {name}={shown}; turn it off")


def layer_attention(module: nn.Module) -> LayerAttention:
    """What ``config.moba`` says for an attention module of a transformers model.

    Raises:
        InputError: no rules in the config, or rules that do not resolve.
        UnsupportedError: rules with a key convolution, or rotary frequencies that the model does not compute.
    """
    config: Any = module.config
    moba = config.__dict__.get("moba")
    rules = moba_rules(moba)
    if moba is None or moba.get("attention") is None:
        raise InputError(
            "attn_implementation='moba' needs rules in the config: set config.moba = "
            "{'attention': [{'pattern': 'moba', 'block_size': ..., 'top_k': ...}]}"
        )
    if rope_steps(moba):
        raise UnsupportedError(
            "moba.rope extends the context in a way that a stock model does not compute; use mobazoo.load"
        )
    number: Any = module.layer_idx
    layer = resolve_layer(rules, number, config.num_hidden_layers, "moba.attention")
    if layer.kconv:
        raise UnsupportedError("kconv adds weights that a stock model does not have; convert to a zoo checkpoint")
    return layer


def _own_mask(mask: Tensor | None, slots: int) -> Tensor:
    """The mask, if it is one of ``moba_mask``.

    Another tensor of this shape and dtype would be a mask for one query at most.
    """
    if mask is None or mask.dim() != 4 or mask.dtype != torch.int32 or mask.shape[2] > 2 or mask.shape[3] != slots:
        got = None if mask is None else f"{list(mask.shape)} {mask.dtype}"
        raise UnsupportedError(
            f"attn_implementation='moba' was given a foreign mask: {got}; pass a [B, S] padding mask or none"
        )
    return mask


def _segments(mask: Tensor, position_ids: Tensor | None, query: Tensor, key: Tensor) -> Segments:
    batch, slots = key.shape[0], key.shape[2]
    pos = mask[:, 0, 0].expand(batch, slots) if mask.shape[2] else None
    if position_ids is not None and query.shape[2] == slots:
        return _packed(mask, position_ids, None if pos is None else pos >= 0, batch)
    if pos is None:
        return Segments.single(batch, slots, key.device)
    doc = torch.where(pos >= 0, 0, -1).to(torch.int32)
    return Segments(doc, pos.clamp(min=0), max_docs=1, max_len=slots)


def _packed(mask: Tensor, position_ids: Tensor, real: Tensor | None, batch: int) -> Segments:
    """Documents from ``position_ids``, made by the first layer and left on the mask, which lives one forward."""
    ids = position_ids.expand(batch, position_ids.shape[1])
    if torch.compiler.is_compiling():
        return Segments.from_position_ids(ids, real)
    made: tuple[Tensor, Segments] | None = mask.__dict__.get(_MADE)
    if made is None or made[0] is not position_ids:
        made = (position_ids, Segments.from_position_ids(ids, real))
        mask.__dict__[_MADE] = made
    return made[1]
