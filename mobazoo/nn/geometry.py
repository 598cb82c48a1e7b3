"""Where the tokens of one forward stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache

from mobazoo.attention import Segments
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.nn.cache import MobaCache
from mobazoo.nn.rows import Rows
from mobazoo.nn.sequence import RowShare


@dataclass(frozen=True)
class Geometry:
    """Built once per forward, read by every layer.

    Attributes:
        segments: documents of the ``S`` slots that keys occupy.
        q_start: slot of the first token, an int or a 0-dim tensor.
        prompt: how many of the forward's tokens are of the prompt; the others are decoded.
        cos: ``[B, 1, T, D]``, of the whole row where rows are shared.
        sin: as ``cos``.
        sequence: this process's part of the row (None: all of it).
    """

    segments: Segments
    q_start: int | Tensor
    prompt: int
    cos: Tensor
    sin: Tensor
    sequence: RowShare | None = None


def past_length(cache: Cache | None) -> int | Tensor:
    """Tokens in the cache; a tensor only inside a compiled graph, which must not read a static cache's counter."""
    past: int | Tensor = 0 if cache is None else cache.get_seq_length()
    if isinstance(past, Tensor):
        return past.clone().reshape(()) if torch.compiler.is_compiling() else int(past)  # it counts on in place
    return past


def prompt_part(length: int, start: int | Tensor, decode_from: int | None, mask: Tensor | None, slots: int) -> int:
    """How many of ``length`` tokens stand before ``decode_from``.

    Inside a compiled graph ``start`` on a static cache is unknown, but for what the mask's width says: it ends where
    the tokens end, or has a column for every slot. Without one a single token is decoded there, and several are prompt.

    Args:
        length: tokens of this forward.
        start: slot of the first.
        decode_from: slot of the first token after the prompt (None: everything is prompt).
        mask: ``[B, past + T]`` or ``[B, slots]``.
        slots: of the cache.
    """
    if decode_from is None or (mask is not None and mask.shape[1] <= decode_from):
        return length
    if isinstance(start, Tensor):
        if mask is None or mask.shape[1] == slots:
            return 0 if length == 1 else length
        start = mask.shape[1] - length
    return min(max(decode_from - start, 0), length)


def documents(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    past: int | Tensor,
    max_docs: int | None,
    max_len: int | None,
) -> tuple[Segments, bool]:
    """The documents of all slots, and whether rows are packed as far as the host can know.

    Args:
        shape: ``[B, T]`` of this forward's tokens.
        device: of the tokens.
        attention_mask: ``[B, past + T]``, 0 at padding.
        position_ids: ``[B, T]`` or ``[1, T]``.
        cache: earlier tokens; a static one has more slots than tokens.
        past: tokens in the cache.
        max_docs: most documents in a row, if the collator said.
        max_len: longest document, if the collator said.

    Raises:
        InputError: a mask of another shape, or documents with holes.
        UnsupportedError: packed rows with a static cache.
    """
    batch, length = shape
    slots = length if cache is None else cache.get_mask_sizes(length, 0)[0]
    if attention_mask is not None:
        _check_mask(attention_mask, batch, length, past, slots)
    if isinstance(cache, MobaCache) and (isinstance(past, Tensor) or past):
        if position_ids is not None:
            _refuse_packing(position_ids.expand(batch, length), attention_mask, past)
        return _continued(shape, device, attention_mask, cache, past), False
    if position_ids is not None:
        position_ids = position_ids.expand(batch, length)
        if slots == length:
            segments = Segments.from_position_ids(position_ids, attention_mask, max_docs, max_len)
            known = max_docs is not None or not torch.compiler.is_compiling()
            return segments, known and segments.max_docs > 1
        _refuse_packing(position_ids, attention_mask, past)
    if attention_mask is None:
        return Segments.single(batch, slots, device), False
    # Slots a static cache has not written belong to the open document: causality hides them.
    return Segments.from_attention_mask(pad(attention_mask, (0, slots - attention_mask.shape[1]), value=1)), False


def _continued(
    shape: tuple[int, int], device: torch.device, mask: Tensor | None, cache: MobaCache, past: int | Tensor
) -> Segments:
    """The documents of a cache's slots after new tokens; the cache knows where rows begin.

    After the prompt every token is real, so that a decoding step need not look at the mask.
    """
    batch, length = shape
    decoding = cache.decode_from is not None and (isinstance(past, Tensor) or past >= cache.decode_from)
    if mask is None or decoding:
        return cache.segments(batch, length, device)
    if isinstance(past, Tensor):
        cache.begin(Rows.from_mask(mask), past, device)
        return cache.segments(batch, length, device)
    mask = mask[:, : past + length]
    segments = Segments.from_attention_mask(mask)
    cache.begin(Rows.from_mask(mask), past, device)
    return segments


def _check_mask(mask: Tensor, batch: int, length: int, past: int | Tensor, slots: int) -> None:
    want = slots if isinstance(past, Tensor) else past + length
    good = mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] <= slots
    fits = good and (isinstance(past, Tensor) or mask.shape[1] == want or mask.shape[1] == slots)
    if not fits:
        raise InputError(
            f"attention_mask: want [B, past + T] = [{batch}, {want}] with 0 at padding, got {list(mask.shape)}; "
            "zoo models build their own causal mask"
        )


def _refuse_packing(position_ids: Tensor, mask: Tensor | None, past: int | Tensor) -> None:
    if position_ids.shape[1] == 1 or isinstance(past, Tensor):
        return
    jump = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if mask is not None:
        real = mask[:, past : past + position_ids.shape[1]] != 0
        jump = jump & real[:, 1:] & real[:, :-1]
    if jump.any():
        raise UnsupportedError(
            "position_ids restart inside a row that is cached: a KV cache holds one document a row; "
            "pass use_cache=False and no past_key_values"
        )
