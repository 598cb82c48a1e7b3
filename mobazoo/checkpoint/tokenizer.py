"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mobazoo.errors import InputError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of a folder; no code of the folder is run.

    Raises:
        InputError: there is none, or none that loads.
    """
    if not any((folder / name).exists() for name in _FILES):
        raise InputError(
            f"{folder}: has no tokenizer ({', '.join(_FILES)}); copy the tokenizer's files from the model it comes from"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # its files are read by several libraries, each with errors of its own
        why = " ".join(str(error).split())
        raise InputError(f"{folder}: its tokenizer does not load: {why or type(error).__name__}") from None
