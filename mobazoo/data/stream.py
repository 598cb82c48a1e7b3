"""Rows of documents that are read while they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from mobazoo.data.rows import Row, Rows
from mobazoo.data.source import Document
from mobazoo.data.tokens import Tokens, encoded
from mobazoo.errors import InputError

_ROWS = 256  # packed and shuffled together


class Stream(Dataset[Row]):
    """The rows of a run, to be asked for in order; some may be left out, for another process or an earlier run.

    Documents are packed and shuffled some hundred rows at a time, so the order depends on nothing but the source and
    the seed. To go on in the middle of a run the stream is read again from its beginning.

    Args:
        documents: opens the source; it is opened again when it ends.
        tokenizer: for the documents.
        length: slots of a row.
        count: rows in the run.
        seed: of the shuffling.
    """

    def __init__(
        self,
        documents: Callable[[], Iterator[Document]],
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        count: int,
        seed: int,
    ) -> None:
        self.documents, self.tokenizer = documents, tokenizer
        self.length, self.count, self.seed = length, count, seed
        self.sizes: dict[int, int] = {}
        self.seen = 0
        self._rows = self._all()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Row:
        assert number >= self.seen, "a stream is read forwards only"
        while True:
            row = next(self._rows)
            self.seen += 1
            for size in row.sizes:
                self.sizes[size] = self.sizes.get(size, 0) + 1
            if self.seen > number:
                return row

    def _all(self) -> Iterator[Row]:
        part = 0
        while True:
            found = False
            for tokens in self._parts():
                rows = Rows(tokens, self.length)
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + part)
                for at in torch.randperm(len(rows), generator=generator).tolist():
                    found = True
                    yield rows[at]
                part += 1
            if not found:
                raise InputError("data: no document is left; look at data.path, files, split and min_chars")

    def _parts(self) -> Iterator[Tokens]:
        ids: list[int] = []
        learn, lengths = bytearray(), []
        for _, tokens, learned in encoded(self.documents(), self.tokenizer):
            if len(tokens) < 2:
                continue
            ids += tokens
            learn += bytes(learned)
            lengths.append(len(tokens))
            if len(ids) >= _ROWS * self.length:
                yield _tokens(ids, learn, lengths)
                ids, learn, lengths = [], bytearray(), []
        if ids:
            yield _tokens(ids, learn, lengths)


def _tokens(ids: list[int], learn: bytearray, lengths: list[int]) -> Tokens:
    flat = torch.tensor(ids, dtype=torch.int32)
    return Tokens(flat, torch.frombuffer(learn, dtype=torch.bool), tuple(lengths), ("",) * len(lengths))
