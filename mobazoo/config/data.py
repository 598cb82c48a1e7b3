"""Which documents to read. Plain data: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from mobazoo.errors import InputError
from mobazoo.extras import require

STDLIB = "stdlib"
FORMATS = ("text", "jsonl", "parquet", "hub")
_LIBRARIES = {"parquet": "pyarrow", "hub": "datasets"}
SPLITS = ("train", "validation", "all")


@dataclass(frozen=True, slots=True)
class Data:
    """A source of documents, always read in the same order.

    Attributes:
        path: a folder, a file, a Hub dataset with ``format: hub``, or ``stdlib``: the source of this Python's own
            standard library without its tests.
        format: ``text`` (a file is a document), ``jsonl`` or ``parquet`` (a row is a document), or ``hub``.
        files: globs below a folder (empty: ``**/*.py`` of the standard library, else every ``.txt``, ``.jsonl`` or
            ``.parquet``).
        split: ``train``, ``validation`` or ``all``; a hash of each document's name decides, so documents stay where
            they are when others come or go.
        validation: share of the documents that are validation.
        min_chars: shorter texts are left out.
        max_documents: read no more than this many (None: all).
        text: the key or column that holds a row's text.
        messages: the key or column that holds a chat, a list of ``{role, content}``, instead of ``text``.
        subset: configuration of a Hub dataset.
        part: split of a Hub dataset, as it names it.
        revision: branch, tag or commit of a Hub dataset.
        streaming: read a Hub dataset while it is used instead of downloading it first.
    """

    path: str
    format: str = "text"
    files: list[str] = field(default_factory=list)
    split: str = "all"
    validation: float = 0.05
    min_chars: int = 1
    max_documents: int | None = None
    text: str = "text"
    messages: str | None = None
    subset: str | None = None
    part: str = "train"
    revision: str | None = None
    streaming: bool = False

    def check(self, where: str = "data") -> None:
        """Everything that can be known without reading.

        Raises:
            InputError: a value that no source could use.
        """
        for name, value, known in (("format", self.format, FORMATS), ("split", self.split, SPLITS)):
            if value not in known:
                raise InputError(f"{where}.{name}: want one of {', '.join(known)}, got {value!r}")
        if not 0 <= self.validation < 1:
            raise InputError(f"{where}.validation: want a share from 0 up to 1, got {self.validation}")
        if self.split == "validation" and not self.validation:
            raise InputError(f"{where}.validation: 0 leaves no document for split: validation; give a share")
        if self.min_chars < 0:
            raise InputError(f"{where}.min_chars: want a number of characters >= 0, got {self.min_chars}")
        if self.max_documents is not None and self.max_documents < 1:
            raise InputError(f"{where}.max_documents: want a number >= 1, got {self.max_documents}")
        if self.path == STDLIB and self.format != "text":
            raise InputError(f"{where}.format: {STDLIB} is text, got {self.format!r}; leave format out")
        if self.messages is not None and self.format == "text":
            raise InputError(f"{where}.messages: text files hold no chats; set format to jsonl, parquet or hub")
        if self.streaming and self.format != "hub":
            raise InputError(f"{where}.streaming: only Hub datasets stream; set format: hub, or leave it out")

    def require(self) -> None:
        """Refuses to begin without the library that reads ``format``.

        Raises:
            UnsupportedError: it is not here.
        """
        if self.format in _LIBRARIES:
            require(_LIBRARIES[self.format], "data.format", "mobazoo[data]")
