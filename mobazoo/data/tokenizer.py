"""A tokenizer from a folder or the Hub, without running its code."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mobazoo.checkpoint.hub import locate
from mobazoo.errors import InputError


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id.

    Raises:
        InputError: none that loads.
    """
    folder = locate(path_or_name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no tokenizer that loads: {str(error).splitlines()[0]}") from None
    return tokenizer
