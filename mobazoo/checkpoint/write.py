"""Writing a checkpoint folder file by file; at most one file's tensors are in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mobazoo.checkpoint.compare import FLOATS
from mobazoo.checkpoint.folder import CONFIG, INDEX, TOKENIZER, WEIGHTS, Folder, inside, read_json
from mobazoo.checkpoint.manifest import MANIFEST
from mobazoo.checkpoint.plan import OutShard, Plan
from mobazoo.errors import InputError

Done = Callable[[int], None]
_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md")
_NAMES = ("LICENSE", "NOTICE")
_MAX_SMALL = 64 << 20


def write_shards(folder: Folder, plan: Plan, new: Path, done: Done) -> dict[str, int]:
    """Writes all weights and their index; returns how many files were ``linked``, ``copied`` and ``written``."""
    counts = {"linked": 0, "copied": 0, "written": 0}
    total = len(plan.shards)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(plan.shards, 1):
        name = WEIGHTS if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        counts[_write_shard(folder, shard, new / name)] += 1
        weight_map |= dict.fromkeys(shard.pieces, name)
        done(sum(piece.info.nbytes for piece in shard.pieces.values()))
    if total > 1:
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(new / INDEX, index)
    return counts


def _write_shard(folder: Folder, shard: OutShard, path: Path) -> str:
    if shard.same is not None:
        try:
            os.link(shard.same.file, path)
        except OSError:  # another file system, or one without links
            shutil.copyfile(shard.same.file, path)
            return "copied"
        return "linked"
    tensors = {}
    for name, piece in shard.pieces.items():
        kind: torch.dtype = getattr(torch, FLOATS[piece.info.dtype])
        tensors[name] = torch.zeros(piece.info.shape, dtype=kind) if piece.new else cast(folder.read(name), kind, name)
    save_file(tensors, path, metadata={"format": "pt"})
    return "written"


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``tensor`` in another dtype.

    Raises:
        InputError: a finite value that is infinite there.
    """
    if tensor.dtype == dtype:
        return tensor
    out = tensor.to(dtype)
    if not torch.equal(out.isfinite(), tensor.isfinite()):
        raise InputError(f"{name}: has values that {str(dtype).removeprefix('torch.')} cannot hold; use bfloat16")
    return out


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """JSON as transformers writes it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_small(name: str) -> bool:
    """Whether a file is one that checkpoints carry besides weights: tokenizer, settings, licence, card; never code."""
    return name in _NAMES or name.endswith(_SUFFIXES)


def copy_small(folder: Path, new: Path) -> None:
    """Copies tokenizer, generation settings, licence and card; what the conversion writes itself is left out."""
    for path in sorted(folder.iterdir()):
        own = path.name in (CONFIG, MANIFEST) or path.name.endswith(".index.json")
        if own or not is_small(path.name) or not path.is_file():
            continue
        real = inside(folder, path.name)
        if real.stat().st_size <= _MAX_SMALL:
            shutil.copyfile(real, new / path.name)


def raise_limit(new: Path, positions: int) -> None:
    """Lets a copied tokenizer make as many tokens as the extended context holds."""
    path = new / TOKENIZER
    said = read_json(path) if path.exists() else {}
    limit = said.get("model_max_length")
    if isinstance(limit, int | float) and limit < positions:
        write_json(path, {**said, "model_max_length": positions})


def new_bytes(plan: Plan, dest: Path) -> int:
    """Bytes that writing takes on the disk of ``dest``, whose parents may not be there yet."""
    place = next(parent for parent in dest.absolute().parents if parent.exists())
    device = place.stat().st_dev
    return sum(
        piece.info.nbytes
        for shard in plan.shards
        if shard.same is None or shard.same.file.stat().st_dev != device
        for piece in shard.pieces.values()
    )
