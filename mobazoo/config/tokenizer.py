"""The recipe of ``mobazoo tokenizer``. Plain data: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from mobazoo.config.data import Data
from mobazoo.errors import InputError

SMALLEST = 256 + 3  # every byte, and the three special tokens


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """A byte-level BPE tokenizer, learned from documents.

    Attributes:
        dest: folder to write.
        data: what to learn from.
        vocab: tokens in all, bytes and special ones included.
        max_length: the longest text a model behind it takes, in tokens (``model_max_length``).
        overwrite: whether a tokenizer already at ``dest`` may be replaced.
    """

    dest: str
    data: Data
    vocab: int = 2048
    max_length: int = 4096
    overwrite: bool = False

    def check(self) -> None:
        """Everything that can be known without reading.

        Raises:
            InputError: a value that no tokenizer could have.
        """
        self.data.check()
        if self.vocab < SMALLEST:
            raise InputError(f"tokenizer.vocab: want at least {SMALLEST} (bytes and special tokens), got {self.vocab}")
        if self.max_length < 1:
            raise InputError(f"tokenizer.max_length: want a number of tokens >= 1, got {self.max_length}")
