"""A model and its tokenizer, on the device a recipe names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mobazoo.checkpoint.hub import locate
from mobazoo.checkpoint.load import Progress, load
from mobazoo.errors import InputError
from mobazoo.nn.causal_lm import MobaForCausalLM


def ready_model(
    name: str,
    *,
    attention: Sequence[Mapping[str, Any]] = (),
    device: str = "auto",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> MobaForCausalLM:
    """``load``, where ``auto`` is a GPU if there is one.

    Raises:
        InputError, UnsupportedError: as ``load``.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(name, attention=attention, device=device, dtype=dtype, progress=progress)


def ready_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder or Hub id.

    Raises:
        InputError: there is none that loads.
    """
    folder = locate(name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no tokenizer that loads: {str(error).splitlines()[0]}") from None
    return tokenizer
