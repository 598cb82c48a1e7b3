"""A checkpoint folder, read without trusting it: no path out of it, no pickle, no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobazoo.checkpoint.header import TensorInfo, read_header
from mobazoo.errors import InputError, UnsupportedError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer_config.json"
_MAX_JSON = 64 << 20
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its name in the folder, where it really lies, what it holds."""

    name: str
    file: Path
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.file.stat().st_size


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder whose headers agree with its index; no tensor has been read."""

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Path]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """A tensor by name, as stored. It may be a view of the file: copy what you keep.

        The file is opened for this tensor only, so that pages of other tensors do not count as memory in use.
        """
        try:
            with safe_open(self.files[name], "pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.files[name]}: cannot read {name}: {error}") from None


def open_folder(path: Path) -> Folder:
    """Reads the configuration, the index and every shard's header.

    Raises:
        InputError: not a checkpoint folder, a missing or damaged file, a path that leaves the folder, an index that
            disagrees with its shards.
        UnsupportedError: pickled weights only.
    """
    try:
        return _open(path)
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror}") from None


def _open(path: Path) -> Folder:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    if not (path / CONFIG).exists() and not (path / CONFIG).is_symlink():
        raise InputError(f"{path}: not a checkpoint folder: it has no {CONFIG}")
    config = read_json(inside(path, CONFIG))
    shards = tuple(Shard(name, file, read_header(file)) for name, file in _shard_files(path).items())
    _check_index(path, shards)
    where = {name: shard for shard in shards for name in shard.tensors}
    tensors = {name: shard.tensors[name] for name, shard in where.items()}
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(tensors):  # a model of a billion layers would take an age to refuse
        raise InputError(f"{path}: {CONFIG} says {layers} layers, but there are only {len(tensors)} tensors")
    return Folder(path, config, shards, tensors, {name: shard.file for name, shard in where.items()})


def inside(folder: Path, name: str) -> Path:
    """Where a file named by a checkpoint really lies.

    Links may lead anywhere in the folder and, in a snapshot of the Hub's cache, to the same repository's ``blobs``.

    Raises:
        InputError: a path that leaves the folder, or no such file.
    """
    windows = PureWindowsPath(name)  # splits at both kinds of slash
    if not name or "\0" in name or windows.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise InputError(f"{folder}: file {name!r} is outside the folder; its index is damaged or hostile")
    root, path = folder.resolve(), folder / name
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise InputError(f"{path}: missing; fetch the checkpoint again") from None
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(f"{path}: a link that leaves the folder (to {real}); copy the file instead")
    if not real.is_file():
        raise InputError(f"{path}: not a regular file")
    return real


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: too large, not JSON, or not an object.
    """
    if path.stat().st_size > _MAX_JSON:
        raise InputError(f"{path}: {path.stat().st_size} bytes, too large for a configuration")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: want a JSON object, got {type(found).__name__}")
    return found


def _shard_files(path: Path) -> dict[str, Path]:
    single, index = (path / WEIGHTS), (path / INDEX)
    if single.exists() and index.exists():
        raise InputError(f"{path}: has both {WEIGHTS} and {INDEX}; remove the stale one")
    if index.exists() or index.is_symlink():
        weight_map = _weight_map(path)
        return {name: inside(path, name) for name in sorted(set(weight_map.values()))}
    if single.exists() or single.is_symlink():
        return {WEIGHTS: inside(path, WEIGHTS)}
    pickles = sorted(found.name for pattern in _PICKLES for found in path.glob(pattern))
    if pickles:
        raise UnsupportedError(
            f"{path}: only pickled weights ({pickles[0]}), which can run code when loaded; if you trust them, "
            "save them anew: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise InputError(f"{path}: no weights: neither {WEIGHTS} nor {INDEX}")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(inside(path, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{path / INDEX}: want weight_map, an object from tensor to file name")
    return weight_map


def _check_index(path: Path, shards: tuple[Shard, ...]) -> None:
    if not (path / INDEX).exists():
        return
    listed = set(_weight_map(path).items())
    held = {(name, shard.name) for shard in shards for name in shard.tensors}
    for name, file in sorted(listed - held):
        raise InputError(f"{path / file}: {name} is missing; the index says it is there ({len(listed - held)} such)")
    for name, file in sorted(held - listed):
        raise InputError(f"{path / file}: unexpected {name}; the index does not list it ({len(held - listed)} such)")
