"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mobazoo.checkpoint.family import build_config, family_of
from mobazoo.checkpoint.folder import CONFIG, TOKENIZER, inside, read_json
from mobazoo.checkpoint.hub import locate
from mobazoo.errors import InputError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path_or_name: str | Path) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of a checkpoint, plain or zoo, by folder or Hub id; no code of it is run.

    Raises:
        InputError: there is none, or none that loads.
        UnsupportedError: a checkpoint of another architecture.
    """
    folder = locate(path_or_name)
    if not any((folder / name).exists() for name in _FILES):
        raise InputError(
            f"{folder}: has no tokenizer ({', '.join(_FILES)}); copy the tokenizer's files from the model it comes from"
        )
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if not (folder / TOKENIZER).exists() or not read_json(inside(folder, TOKENIZER)).get("tokenizer_class"):
        # The class is then that of the model type, and transformers knows those of its own types only.
        said = read_json(inside(folder, CONFIG)) if (folder / CONFIG).exists() else {}  # a tokenizer may stand alone
        if said:
            options["config"] = build_config(family_of(said, folder).stock[0], said, folder)
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # its files are read by several libraries, each with errors of its own
        why = " ".join(str(error).split())
        raise InputError(f"{folder}: its tokenizer does not load: {type(error).__name__}: {why}") from None
