"""Which tensors a conversion writes into which file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import split_state_dict_into_shards_factory

from mobazoo.checkpoint.compare import FLOATS, is_computed
from mobazoo.checkpoint.folder import Folder, Shard
from mobazoo.checkpoint.header import TensorInfo
from mobazoo.errors import InputError, UnsupportedError

DEFAULT_SHARD = "5GB"
KCONV = ".k_conv.weight"
_STORED = {name: stored for stored, name in FLOATS.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor to write; ``new`` ones are zeros, the others come from the source, cast where ``info`` says so."""

    info: TensorInfo
    new: bool = False


@dataclass(frozen=True, slots=True)
class OutShard:
    """A file to write; ``same`` is the source file that it equals byte for byte."""

    pieces: Mapping[str, Piece]
    same: Shard | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """All files of a conversion, in order, and the tensors that come or go."""

    shards: tuple[OutShard, ...]
    added: tuple[str, ...]
    dropped: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(piece.info.nbytes for shard in self.shards for piece in shard.pieces.values())


def make_plan(
    folder: Folder, expected: Mapping[str, tuple[int, ...]], dtype: str | None, max_shard_size: int | str | None
) -> Plan:
    """Files that are as in the source stay as they are; the rest is cast, dropped or split anew.

    Args:
        folder: the source.
        expected: tensors of the model that the result is for.
        dtype: torch name of the new dtype (None: as stored).
        max_shard_size: see ``ConvertRecipe``.

    Raises:
        InputError: a shard size that is none.
        UnsupportedError: a key convolution that has learned something would be lost.
    """
    dropped = tuple(name for name, info in folder.tensors.items() if _goes(name, info, expected))
    for name in dropped:
        if folder.read(name).any():
            raise UnsupportedError(f"{folder.path}: {name} is not zero, and the result has no place for it")
    kept = {
        name: Piece(info if dtype is None or is_computed(name) else TensorInfo(_STORED[dtype], info.shape))
        for name, info in folder.tensors.items()
        if name not in dropped
    }
    stored = _STORED[dtype] if dtype else _common(folder)
    added = {
        name: Piece(TensorInfo(stored, shape), new=True)
        for name, shape in expected.items()
        if name not in kept and name.endswith(KCONV)
    }
    return Plan(tuple(_shards(folder, kept, added, max_shard_size)), tuple(added), dropped)


def _goes(name: str, info: TensorInfo, expected: Mapping[str, tuple[int, ...]]) -> bool:
    return name.endswith(KCONV) and expected.get(name) != info.shape


def _common(folder: Folder) -> str:
    sizes: dict[str, int] = {}
    for info in folder.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda name: sizes[name])


def _shards(
    folder: Folder, kept: Mapping[str, Piece], added: Mapping[str, Piece], max_shard_size: int | str | None
) -> list[OutShard]:
    unchanged = {
        frozenset(shard.tensors): shard
        for shard in folder.shards
        if all(name in kept and kept[name].info == info for name, info in shard.tensors.items())
    }
    if max_shard_size is not None:
        groups = _split({**kept, **added}, max_shard_size)
    else:
        groups = [added] if added else []
        for shard in reversed(folder.shards):
            group = {name: kept[name] for name in shard.tensors if name in kept}
            same = frozenset(shard.tensors) in unchanged
            groups = ([group] if same else _split(group, DEFAULT_SHARD)) + groups
    return [OutShard(group, unchanged.get(frozenset(group))) for group in groups]


def _split(pieces: Mapping[str, Piece], size: int | str) -> list[Mapping[str, Piece]]:
    if not pieces:
        return []
    try:
        split = split_state_dict_into_shards_factory(
            dict(pieces),
            get_storage_size=lambda piece: piece.info.nbytes,
            filename_pattern="{suffix}",
            max_shard_size=size,
        )
    except ValueError as error:
        raise InputError(f"convert.max_shard_size: {error}") from None
    return [{name: pieces[name] for name in names} for names in split.filename_to_tensors.values() if names]
