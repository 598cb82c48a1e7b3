"""Rows of JSONL files, Parquet files and Hub datasets as documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mobazoo.config.data import Data
from mobazoo.data.source import Document, find_files
from mobazoo.errors import InputError

_BATCH = 1024


def read_records(data: Data) -> Iterator[Document]:
    """Every row of the source, as a text or a chat; ``path:line`` is its name.

    Raises:
        InputError: a file or row that is not what the recipe says, naming it.
        UnsupportedError: a library that is not here.
    """
    data.require()
    rows = {"jsonl": _jsonl, "parquet": _parquet, "hub": _hub}[data.format]
    for name, row in rows(data):
        yield _document(name, row, data)


def _document(name: str, row: Mapping[str, Any], data: Data) -> Document:
    column = data.messages or data.text
    if column not in row:
        key = "messages" if data.messages else "text"
        raise InputError(f"{name}: has no {column!r}, only {', '.join(map(str, row))}; say which by data.{key}")
    value = row[column]
    if data.messages:
        return Document(name, messages=_chat(name, value))
    if not isinstance(value, str):
        raise InputError(f"{name}: want text in {column!r}, got {type(value).__name__}")
    return Document(name, value)


def _chat(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    good = isinstance(value, list) and bool(value)
    for message in value if good else ():
        good = good and isinstance(message, Mapping) and {"role", "content"} <= message.keys()
    if not good:
        raise InputError(f"{name}: want a list of {{role, content}}, got {str(value)[:60]}")
    if not any(message["role"] == "assistant" for message in value):
        raise InputError(f"{name}: has no message of the assistant, so there is nothing to learn; leave it out")
    return tuple(dict(message) for message in value)


def _jsonl(data: Data) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, path in find_files(data):
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{name}:{number}", _parsed(line, path, number)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _parsed(line: bytes, path: Path, number: int) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise InputError(f"{path}:{number}: want a JSON object, got {type(row).__name__}")
    return row


def _parquet(data: Data) -> Iterator[tuple[str, Mapping[str, Any]]]:
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    wanted = data.messages or data.text
    for name, path in find_files(data):
        try:
            with parquet.ParquetFile(path) as file:
                if wanted not in file.schema_arrow.names:
                    _document(name, dict.fromkeys(file.schema_arrow.names), data)
                number = 0
                for batch in file.iter_batches(_BATCH, columns=[wanted]):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{name}:{number}", row
        except (arrow.ArrowException, OSError) as error:
            raise InputError(f"{path}: not Parquet that can be read: {' '.join(str(error).split())[:200]}") from None


def _hub(data: Data) -> Iterator[tuple[str, Mapping[str, Any]]]:
    datasets = import_module("datasets")
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(
            data.path, data.subset, split=data.part, revision=data.revision, streaming=data.streaming
        )
        for number, row in enumerate(rows, 1):  # of a stream, what is damaged or out of reach shows here
            yield f"{data.path}:{number}", row
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"data.path: {data.path}: {' '.join(str(error).split())[:200]}") from None
