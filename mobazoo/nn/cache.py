"""``MobaCache``: the KV cache of zoo models, in transformers' ``Cache`` protocol."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from mobazoo.attention import Centroids, Segments
from mobazoo.errors import InputError
from mobazoo.nn.cache_layer import MobaCacheLayer
from mobazoo.nn.rows import Rows
from mobazoo.nn.storage import check_offload


class MobaCache(Cache):
    """Keys and values of every layer, each MoBA layer's centroids, and which tokens count as decoded.

    It grows (over-allocating by a quarter, so that a token never copies the cache), or has ``max_length`` slots from
    the start, with which a compiled step needs no new memory and no wait for the device. A row holds one document;
    rows may be padded on the left, each by its own length.

    Args:
        config: of the zoo model.
        max_length: slots of a static cache (None: it grows).
        offload: keep keys and values in host memory (``host``) or in mapped files in this folder; sparse decoding
            brings only the chosen blocks to the device, prefill one layer at a time.

    Attributes:
        decode_from: slot of the first token after the prompt, from which on each layer's decode pattern is used
            (None: everything is prompt). ``generate`` sets it, and it stays for plain forwards until it is set again.

    Raises:
        InputError: ``max_length`` below 1, or a folder that is not there.
    """

    layers: list[MobaCacheLayer]  # type: ignore[assignment]

    def __init__(
        self, config: PreTrainedConfig, max_length: int | None = None, offload: str | Path | None = None
    ) -> None:
        if max_length is not None and max_length < 1:
            raise InputError(f"MobaCache: max_length must be at least 1, got {max_length}")
        check_offload(offload)
        rules = config.attention_layers()
        super().__init__(layers=[MobaCacheLayer(max_length, rule.kconv, offload) for rule in rules])
        self.max_length = max_length
        self.offload_to = offload
        self.decode_from: int | None = None
        self.rows: Rows | None = None

    def check(self, kconv: tuple[int, ...], batch: int, new: int) -> None:
        """Refuses a cache of a model with other layers, and tokens it has no room for, before anything changes.

        Key heads are looked at where keys arrive: of a model that is split over processes each has a part of them.

        Args:
            kconv: width of the key convolution of each of the model's layers.
            batch: rows of the input.
            new: tokens of a row.

        Raises:
            InputError: saying what differs.
        """
        if len(kconv) != len(self.layers):
            raise InputError(
                f"past_key_values: made for {len(self.layers)} layers, the model has {len(kconv)}; "
                "it is another model's cache"
            )
        for number, (layer, width) in enumerate(zip(self.layers, kconv, strict=True)):
            if layer.kconv != width:
                raise InputError(
                    f"past_key_values: layer {number} is made for kconv {layer.kconv}, the model has {width}; "
                    "it is another model's cache"
                )
            layer.check(batch, new)

    def begin(self, rows: Rows, past: int | Tensor, device: torch.device) -> None:
        """Takes note of where rows begin and end, from the mask of all tokens so far.

        Raises:
            InputError: a row that begins elsewhere than before.
        """
        if self.rows is not None and isinstance(past, int) and past:
            rows.check_continues(self.rows, past)
        padded = rows.first is not None or (self.rows is not None and self.rows.first is not None)
        if self.rows is None or padded or rows.batch != self.rows.batch:  # else they are the same, with their tables
            self.rows = rows
        if self.max_length is not None and not self.rows.stop:  # a compiled step then finds its table
            self.rows.segments(self.max_length, self.max_length, device)

    def segments(self, batch: int, new: int, device: torch.device) -> Segments:
        """The documents of all slots after ``new`` tokens without padding.

        Raises:
            InputError: a row has ended with padding.
        """
        if self.rows is None:
            self.rows = Rows(batch)
        if self.rows.stop:
            raise InputError(
                "past_key_values: a row ends in padding and cannot go on; pad prompts on the left (padding_side='left')"
            )
        slots = self.get_mask_sizes(new, 0)[0]
        return self.rows.segments(slots, self.max_length or slots + slots // 4, device)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What fails inside leaves the cache as it was, and no layer with more tokens than another."""
        marks, known = [layer.mark() for layer in self.layers], (self.decode_from, self.rows)
        try:
            yield
        except BaseException:
            self.decode_from, self.rows = known
            for layer, mark in zip(self.layers, marks, strict=True):
                layer.back_to(mark)
            raise

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        block_size: int = 0,
        rows: Rows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Adds a layer's tokens; returns views of all keys and values. See ``MobaCacheLayer.update``."""
        return self.layers[layer_idx].update(key_states, value_states, block_size, rows or self.rows)

    def centroids(self, layer_idx: int) -> Centroids:
        """A layer's centroids of all complete blocks."""
        layer = self.layers[layer_idx]
        return layer.centroids(self.rows or Rows(layer.batch))

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens from every layer.

        A positive number is the number of tokens to keep, as earlier releases of transformers ask; nothing
        happens where there are fewer.

        Raises:
            InputError: more than can be removed; nothing is changed.
        """
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - self.get_seq_length(), 0)
        for layer in self.layers:
            layer.check_crop(-tokens_to_remove)
        for layer in self.layers:
            layer.crop(tokens_to_remove)
        if tokens_to_remove and self.rows is not None and self.rows.stop:
            count = self.get_seq_length()
            stop = self.rows.stop if min(self.rows.stop) < count else ()
            self.rows = Rows(self.rows.batch, self.rows.first, self.rows.begin, stop)

    def reset(self) -> None:
        """Forgets all tokens and the prompt, and keeps the memory."""
        super().reset()
        self.decode_from, self.rows = None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows ``beam_idx`` of the present ones, as beam search asks."""
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
        if self.rows is not None:
            self.rows = self.rows.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """As ``reorder_cache``."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.rows is not None:
            self.reorder_cache(torch.arange(self.rows.batch).repeat_interleave(repeats))

    def nbytes(self) -> int:
        """Bytes of memory it takes, room to spare included."""
        return sum(layer.nbytes() for layer in self.layers)
