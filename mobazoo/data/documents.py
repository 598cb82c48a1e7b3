"""Documents of a ``Data`` source, in an order that depends on their names only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice

from mobazoo.config.data import STDLIB, Data
from mobazoo.data.records import read_records
from mobazoo.data.source import Document, find_files
from mobazoo.errors import InputError


def read_documents(data: Data) -> Iterator[Document]:
    """Every document of the source's split, one at a time.

    Raises:
        InputError: no such path, no such file below it, or a file that is not what ``format`` says.
    """
    data.check()
    yield from islice(_kept(data), data.max_documents)


def share_of(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, on any machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def in_split(name: str, data: Data) -> bool:
    """Whether the document called ``name`` belongs to ``data.split``."""
    return data.split == "all" or (share_of(name) < data.validation) == (data.split == "validation")


def _kept(data: Data) -> Iterator[Document]:
    for document in _all(data):
        long_enough = bool(document.messages) or len(document.text) >= max(data.min_chars, 1)
        if long_enough and in_split(document.name, data):
            yield document


def _all(data: Data) -> Iterator[Document]:
    if data.format != "text":
        yield from read_records(data)
        return
    for name, path in find_files(data):
        if in_split(name, data):  # known before it is read
            try:
                text = path.read_text("utf-8")
            except UnicodeDecodeError:
                if data.path == STDLIB:  # a few of its files are in other encodings on purpose
                    continue
                raise InputError(f"{path}: not text in UTF-8; leave it out by data.files") from None
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror}") from None
            yield Document(name, text)
