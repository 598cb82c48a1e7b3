"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mobazoo.checkpoint.family import build_config, family_of
from mobazoo.checkpoint.folder import CONFIG, inside, read_json
from mobazoo.errors import InputError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of a checkpoint folder, a zoo folder's as its plain source's; no code of it is run.

    Raises:
        InputError: there is none, or none that loads.
        UnsupportedError: a checkpoint of another architecture.
    """
    if not any((folder / name).exists() for name in _FILES):
        raise InputError(
            f"{folder}: has no tokenizer ({', '.join(_FILES)}); copy the tokenizer's files from the model it comes from"
        )
    said = read_json(inside(folder, CONFIG))
    # A tokenizer may leave its class to the model type, and transformers knows the classes of its own types only.
    plain = build_config(family_of(said, folder).stock[0], said, folder)
    try:
        return AutoTokenizer.from_pretrained(folder, config=plain, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # its files are read by several libraries, each with errors of its own
        why = " ".join(str(error).split())
        raise InputError(f"{folder}: its tokenizer does not load: {type(error).__name__}: {why}") from None
