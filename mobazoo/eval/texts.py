"""Texts of one length to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mobazoo.config.data import Data
from mobazoo.data.documents import read_documents
from mobazoo.data.tokens import encoded
from mobazoo.errors import InputError


@dataclass(frozen=True, slots=True)
class Texts:
    """The beginnings of documents.

    Attributes:
        ids: ``[texts, length]`` int64.
        names: of the documents.
    """

    ids: Tensor
    names: tuple[str, ...]


def read_texts(data: Data, tokenizer: PreTrainedTokenizerBase, length: int, most: int, verb: str = "eval") -> Texts:
    """The first ``length`` tokens of the first ``most`` documents that have as many.

    A text begins where its document does, so that a position is the number of tokens there were to learn from.

    Raises:
        InputError: no document is that long.
    """
    found: dict[str, list[int]] = {}
    longest = 0
    for name, tokens, _ in encoded(read_documents(data), tokenizer):
        longest = max(longest, len(tokens))
        if len(tokens) >= length:
            found[name] = tokens[:length]
        if len(found) == most:
            break
    if not found:
        raise InputError(
            f"{verb}.length: want a document of {length} tokens, the longest of data.path={data.path} has {longest}; "
            "give a smaller length or other data"
        )
    return Texts(torch.tensor(list(found.values())), tuple(found))
