"""The header of a safetensors file, read and checked without touching a tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mobazoo.errors import InputError

# Bytes of an element; types of less than a byte are no weights of these models.
ELEMENT = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
ELEMENT |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}
_MAX_HEADER = 100_000_000  # the format's own limit
_LFS_POINTER = b"version "


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its header describes it; ``dtype`` in the format's own names (``BF16``, ``F32``, ...)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * ELEMENT[self.dtype]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a safetensors file by name, in the order of their data.

    Raises:
        InputError: a file that is truncated, too long, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == _LFS_POINTER:
            raise InputError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or (length > size - 8 and length <= _MAX_HEADER):
            raise InputError(f"{path}: truncated: {size} bytes end inside its header; fetch the file again")
        if length > _MAX_HEADER:
            raise InputError(f"{path}: not a safetensors file (it claims a header of {length} bytes)")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
        entries = {name: _entry(value) for name, value in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise InputError(f"{path}: not a safetensors file: {' '.join(str(error).split())[:200]}") from None
    return _contiguous(path, entries, size - 8 - length)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names an entry twice")
    return found


def _entry(value: Any) -> tuple[int, int, TensorInfo]:
    dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in ELEMENT:
        raise ValueError(f"unknown dtype {dtype!r} in its header")
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
        raise ValueError("sizes in its header are not whole numbers")
    return start, end, TensorInfo(dtype, shape)


def _contiguous(path: Path, entries: dict[str, tuple[int, int, TensorInfo]], size: int) -> dict[str, TensorInfo]:
    """Data must be exactly the tensors, one after the other."""
    at = 0
    ordered = sorted(entries.items(), key=lambda item: item[1][:2])
    for name, (start, end, info) in ordered:
        if start != at or end - start != info.nbytes:
            raise InputError(
                f"{path}: its header gives {name} bytes {start}..{end}, want {info.nbytes} bytes from {at}"
            )
        at = end
    if size < at:
        raise InputError(f"{path}: truncated: {at - size} of {at} bytes of tensors are missing; fetch the file again")
    if size > at:
        raise InputError(f"{path}: {size - at} bytes follow the last tensor; the file is damaged")
    return {name: info for name, (_, _, info) in ordered}
