"""How much of a device's peak a run uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedConfig

from mobazoo.attention.pattern import Full
from mobazoo.config.rules import LayerAttention
from mobazoo.explain import keys_read

# Dense bfloat16 operations per second, from the makers' data sheets, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12}


def peak(device: torch.device) -> float | None:
    """Operations per second of a GPU (None: not known, or no GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAKS.items() if part in name), None)


def share_of_keys(layers: Sequence[LayerAttention], sizes: Mapping[int, int]) -> float:
    """Share of the keys full attention would read that these layers read, mean over the layers.

    Args:
        layers: of the model.
        sizes: how many documents there are of each length.
    """
    full = sum(keys_read(Full(), size) * times for size, times in sizes.items())
    patterns = [layer.pattern for layer in layers]
    read = {p: sum(keys_read(p, size) * times for size, times in sizes.items()) for p in set(patterns)}
    return sum(read[pattern] for pattern in patterns) / (len(patterns) * max(full, 1))


def operations_per_token(
    config: PreTrainedConfig, parameters: int, layers: Sequence[LayerAttention], sizes: Mapping[int, int]
) -> float:
    """Multiplications and additions, forward and backward, that a token costs.

    Six for each weight besides the embedding, and twelve for each key read, head and head dimension.
    """
    tokens = sum(size * times for size, times in sizes.items())
    full = sum(keys_read(Full(), size) * times for size, times in sizes.items())
    read = share_of_keys(layers, sizes) * full / max(tokens, 1)  # keys a query reads in a layer, on average
    heads = config.num_attention_heads * config.head_dim
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return 6 * (parameters - embedding) + 12 * len(layers) * heads * read
