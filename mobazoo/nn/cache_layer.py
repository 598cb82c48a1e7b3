"""What a cache keeps of one layer: keys, values, the centroids of complete blocks, and raw keys for a convolution."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from mobazoo.attention import Centroids
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.nn.means import block_means
from mobazoo.nn.rows import Rows
from mobazoo.nn.storage import allocate, zeros

# Tokens that a key convolution's state can be cropped by.
MAX_ROLLBACK = 64
# float32 copies of keys made at a time for means.
_MEAN_BYTES = 64 << 20


class MobaCacheLayer(CacheLayerMixin):
    """Grows with room to spare, or has ``max_length`` slots from the start.

    Outside a compiled graph ``keys`` and ``values`` are views of the slots written so far, and the host counts them.
    In a graph, which only a static layer can be part of, the count is a tensor and the views are all slots, so that
    nothing changes its shape and nothing waits for the device; the host's count is then unknown (None) until asked.

    Args:
        max_length: slots (None: it grows).
        kconv: width of the layer's key convolution, 0 for none.
        offload: None, ``host``, or a folder for mapped files; centroids stay on the device.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, max_length: int | None = None, kconv: int = 0, offload: str | Path | None = None) -> None:
        self.max_length, self.kconv, self.offloaded = max_length, kconv, offload
        self.is_compileable = max_length is not None and offload is None
        self.count: int | None = 0
        self.done = 0  # slots whose complete blocks have their mean
        self.block_size = 0
        self.length = torch.tensor(0)  # the count, inside a graph
        self._key_like = torch.empty(0)  # dtype and device of the model's keys
        self._kv: tuple[Tensor, Tensor] | None = None  # [B, Hkv, room, D] each
        self._mean: Tensor | None = None  # [B, Hkv, room // block_size + 1, D]; what no block owns goes to the last
        self._raw: Tensor | None = None  # [B, Hkv, kconv - 1 + MAX_ROLLBACK, D], the last raw keys
        self._kept = 0  # raw keys of it that are known

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether it has memory."""
        return self._kv is not None

    @property
    def room(self) -> int:
        """Slots there is memory for."""
        return self._kv[0].shape[2] if self._kv else 0

    @property
    def batch(self) -> int:
        """Rows there is memory for."""
        return self._kv[0].shape[0] if self._kv else 0

    def nbytes(self) -> int:
        """Bytes of memory it takes."""
        return sum(x.nbytes for x in (*(self._kv or ()), self._mean, self._raw) if x is not None)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """``[B, Hkv, S, D]``, a view of the slots written so far."""
        return self._views()[0] if self._kv else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """As ``keys``."""
        return self._views()[1] if self._kv else None

    def _views(self) -> tuple[Tensor, Tensor]:
        assert self._kv is not None
        keys, values = self._kv
        if torch.compiler.is_compiling():
            return keys, values
        count = self.get_seq_length()
        return keys[:, :, :count], values[:, :, :count]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Memory for rows, heads and dtype like these: a static layer's whole, a growing one's as tokens come."""
        batch, heads, _, dim = key_states.shape
        self._allocate(key_states, value_states, self.max_length or 0)
        self.length = zeros((), torch.empty(0, dtype=torch.int64, device=key_states.device))
        self._key_like = key_states.detach().new_empty(0)
        if self.kconv:
            self._raw = zeros((batch, heads, self.kconv - 1 + MAX_ROLLBACK, dim), key_states)
        self._pin(self.length, self._raw)

    def _allocate(self, k: Tensor, v: Tensor, room: int) -> None:
        keys, values = (allocate((*x.shape[:2], room, x.shape[3]), x, self.offloaded) for x in (k, v))
        if self._kv is not None and self.count:
            for new, old in zip((keys, values), self._kv, strict=True):
                new[:, :, : self.count] = old[:, :, : self.count]
        self._kv = keys, values
        self._pin(keys, values)

    def _pin(self, *tensors: Tensor | None) -> None:
        """Tells the compiler that these stay where they are, which CUDA graphs need."""
        if self.max_length is not None and not torch.compiler.is_compiling():
            for tensor in tensors:
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    def check(self, batch: int, new: int) -> None:
        """Refuses tokens that there is no place for, before anything changes.

        Raises:
            InputError: other rows than the cache holds, or more tokens than it has slots.
        """
        if self._kv is not None and self.batch != batch and self.get_seq_length():
            raise InputError(f"past_key_values: holds {self.batch} rows, the input has {batch}")
        if self.max_length is not None and not torch.compiler.is_compiling():
            past = int(self.get_seq_length())
            if past + new > self.max_length:
                raise InputError(
                    f"past_key_values: {past} tokens and {new} new ones do not fit a static cache of "
                    f"{self.max_length} slots; make it longer"
                )

    def _check_keys(self, k: Tensor) -> None:
        if self._kv is None:
            return
        have = self._kv[0]
        if (have.shape[1], have.shape[3]) != (k.shape[1], k.shape[3]):
            raise InputError(
                f"past_key_values: holds {have.shape[1]} key heads of dim {have.shape[3]}, the model has "
                f"{k.shape[1]} of {k.shape[3]}; it is another model's cache"
            )
        if have.dtype != k.dtype:
            raise InputError(f"past_key_values: holds {have.dtype}, the model has {k.dtype}")

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        block_size: int = 0,
        rows: Rows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens ``[B, Hkv, T, D]``; returns keys and values of all, as views.

        Args:
            key_states: after the convolution and RoPE.
            value_states: the same shape.
            block_size: keep means of blocks of this size (0: keep none).
            rows: where the rows' documents begin.
        """
        batch, _, new, _ = key_states.shape
        self.check(batch, new)
        self._check_keys(key_states)
        if self._kv is None or (self._kv[0].shape[0] != batch and not self.get_seq_length()):
            self.lazy_initialization(key_states, value_states)
        assert self._kv is not None
        if torch.compiler.is_compiling():
            return self._update_traced(key_states, value_states, block_size, rows)
        past = self.get_seq_length()
        if past + new > self.room:
            self._allocate(key_states, value_states, past + new + (past + new) // 4 + 16)
        for buffer, x in zip(self._kv, (key_states, value_states), strict=True):
            buffer[:, :, past : past + new] = x.detach()
        self.count = past + new
        if self.max_length is not None:
            self.length.fill_(self.count)
        if block_size:
            self._complete(block_size, rows or Rows(batch))
        return self._views()

    def _update_traced(
        self, key_states: Tensor, value_states: Tensor, block_size: int, rows: Rows | None
    ) -> tuple[Tensor, Tensor]:
        """``update`` inside a graph: the position is a tensor."""
        assert self._kv is not None
        if self.max_length is None:
            raise UnsupportedError("a growing cache inside a compiled graph; use a static one: max_length=...")
        past, new = self.length.clone(), key_states.shape[2]
        where = torch.arange(new, device=past.device) + past
        for buffer, x in zip(self._kv, (key_states, value_states), strict=True):
            buffer.index_copy_(2, where, x)
        self.length.add_(new)
        self.count = None
        if block_size:
            self._complete_traced(block_size, past, new, rows or Rows(key_states.shape[0]))
        return self._kv

    def _means_for(self, block_size: int) -> Tensor:
        """The means' memory, made or made larger where needed; other block sizes are forgotten."""
        assert self._kv is not None
        keys = self._kv[0]
        columns = keys.shape[2] // block_size + 1
        if self._mean is None or self.block_size != block_size or self._mean.shape[0] != keys.shape[0]:
            self.block_size, self.done, self._mean = block_size, 0, None
        if self._mean is None or self._mean.shape[2] < columns:
            new = zeros((*keys.shape[:2], columns, keys.shape[3]), self._key_like)
            if self._mean is not None:
                new[:, :, : self._mean.shape[2] - 1] = self._mean[:, :, :-1]
            self._mean = new
            self._pin(new)
        return self._mean

    def _complete(self, block_size: int, rows: Rows) -> None:
        """Means of the blocks that became complete."""
        mean, keys, count = self._means_for(block_size), self._views()[0], self.get_seq_length()
        step = max(1, _MEAN_BYTES // (4 * block_size * keys.shape[3] * keys.shape[1]))
        begins = rows.begin or (0,)
        for b, begin in enumerate(begins):
            row = slice(b, b + 1) if rows.begin else slice(None)
            stop = min(count, rows.stop[b]) if rows.stop else count
            n0, n1 = (max(0, end - begin) // block_size for end in (self.done, stop))
            for n in range(n0, n1, step):
                some = min(step, n1 - n)
                first = begin + n * block_size
                blocks = keys[row, :, first : first + some * block_size].unflatten(2, (some, block_size))
                mean[row, :, n : n + some] = block_means(blocks).to(mean.device)
        self.done = count

    def _complete_traced(self, block_size: int, past: Tensor, new: int, rows: Rows) -> None:
        """The same inside a graph: blocks that may have become complete are reduced, and kept where they have."""
        assert self._kv is not None
        if self._mean is None or self.block_size != block_size:
            raise UnsupportedError("the first tokens of a cache inside a compiled graph; prefill outside of it")
        mean, keys = self._mean, self._kv[0]
        batch, heads, room, dim = keys.shape
        first = torch.zeros(batch, dtype=torch.int64, device=past.device) if rows.first is None else rows.first
        before, after = ((end - first).clamp(min=0) // block_size for end in (past, past + new))  # [B] each
        block = before[:, None] + torch.arange(new // block_size + 1, device=past.device)  # [B, n]
        slot = (first[:, None] + block * block_size)[..., None] + torch.arange(block_size, device=past.device)
        slot = slot.clamp(max=room - 1).flatten(1)[:, None, :, None].expand(-1, heads, -1, dim)
        means = block_means(keys.gather(2, slot).unflatten(2, (block.shape[1], block_size)))
        column = torch.where(block < after[:, None], block, mean.shape[2] - 1)  # the last belongs to no block
        mean.scatter_(2, column[:, None, :, None].expand(-1, heads, -1, dim), means)

    def centroids(self, rows: Rows) -> Centroids:
        """The centroids of all complete blocks; in a graph of all blocks there is room for."""
        assert self._mean is not None
        assert self._kv is not None
        size = self.block_size
        count = self._kv[0].shape[2] if torch.compiler.is_compiling() else self.get_seq_length()
        start, doc = rows.starts(size, count, self._mean.device)
        return Centroids(self._mean[:, :, : start.shape[1]], start, doc)

    def raw_before(self, k: Tensor) -> Tensor:
        """The ``kconv - 1`` raw keys before the new ones ``k`` [B, Hkv, T, D], which are kept."""
        self._check_keys(k)
        if self._kv is None or self._kv[0].shape[0] != k.shape[0]:
            self.lazy_initialization(k, k)
        raw = self._raw
        assert raw is not None
        before = raw[:, :, MAX_ROLLBACK:].clone()
        raw.copy_(torch.cat([raw, k.detach()], dim=2)[:, :, -raw.shape[2] :])
        if not torch.compiler.is_compiling():
            self._kept = min(self._kept + k.shape[2], raw.shape[2])
        return before

    def get_seq_length(self) -> int:
        """Tokens in it; a tensor inside a compiled graph."""
        if torch.compiler.is_compiling() and self.max_length is not None and self._kv is not None:
            return self.length  # type: ignore[return-value]
        if self.count is None:
            self.count = int(self.length)
        return self.count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots of keys and values after ``query_length`` new tokens, and the first of them."""
        if torch.compiler.is_compiling() and self.max_length is not None:
            return self.max_length, 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Slots of a static layer, -1 for a growing one."""
        return -1 if self.max_length is None else self.max_length

    get_max_cache_shape = get_max_length  # its name in earlier transformers

    def check_crop(self, remove: int) -> None:
        """Refuses a cut that cannot be made, before anything changes.

        Raises:
            InputError: more tokens than there are, or than the raw keys of a convolution reach back.
        """
        if self._kv is None:
            return
        count = self.get_seq_length()
        if remove > count:
            raise InputError(f"crop: cannot remove {remove} tokens, the cache holds {count}")
        if self.kconv and self._kept - remove < min(self.kconv - 1, count - remove):
            most = max(0, self._kept - (self.kconv - 1))
            raise InputError(
                f"crop: cannot remove {remove} tokens: a layer with kconv keeps the raw keys to go back {most} tokens "
                f"(at most {MAX_ROLLBACK}); prefill again"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` tokens, and the centroids past the cut."""
        remove = -tokens_to_remove
        if not self.is_initialized or remove == 0:
            return
        self.count = self.get_seq_length() - remove
        self.done = min(self.done, self.count)
        if self.max_length is not None:
            self.length.fill_(self.count)
        if self._raw is not None:
            self._raw.copy_(torch.cat([torch.zeros_like(self._raw[:, :, :remove]), self._raw], 2)[:, :, :-remove])
            self._kept -= remove

    def mark(self) -> tuple[int, int, Tensor | None]:
        """What ``back_to`` needs to take back tokens that are added from now on, however many."""
        return self.get_seq_length(), self._kept, None if self._raw is None else self._raw.clone()

    def back_to(self, mark: tuple[int, int, Tensor | None]) -> None:
        """Takes back all tokens added since ``mark``."""
        if self._kv is None:
            return
        self.count, self._kept, raw = mark
        self.done = min(self.done, self.count)
        if self.max_length is not None:
            self.length.fill_(self.count)
        if self._raw is not None:
            self._raw.zero_() if raw is None or not self.count else self._raw.copy_(raw)

    def reset(self) -> None:
        """Forgets all tokens and keeps the memory."""
        self.count, self.done, self._kept = 0, 0, 0
        self.length.zero_()
        for tensor in (*(self._kv or ()), self._mean, self._raw):
            if tensor is not None:
                tensor.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows ``beam_idx`` [B'] of the present ones; in place where their number stays."""
        if self._kv is None:
            return
        count, room, old = self.get_seq_length(), self.room, self._kv
        chosen = [x[:, :, :count].index_select(0, beam_idx.to(x.device)) for x in old]
        if beam_idx.shape[0] != old[0].shape[0]:
            self._kv = None
            self._allocate(chosen[0], chosen[1], room)
        for buffer, x in zip(self._kv or (), chosen, strict=True):
            buffer[:, :, :count] = x
        for name in ("_mean", "_raw"):
            tensor = getattr(self, name)
            if tensor is not None:
                part = tensor.index_select(0, beam_idx.to(tensor.device))
                if part.shape == tensor.shape:
                    tensor.copy_(part)
                else:
                    setattr(self, name, part)
                    self._pin(part)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self._kv is not None:
            self.reorder_cache(torch.arange(self._kv[0].shape[0]).repeat_interleave(repeats))
