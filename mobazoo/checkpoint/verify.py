"""``verify``: proof that a converted folder is the model it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from mobazoo.checkpoint.compare import check_fits
from mobazoo.checkpoint.edit import other_changes
from mobazoo.checkpoint.family import Family, family_of, skeleton, zoo_config
from mobazoo.checkpoint.folder import Folder, open_folder
from mobazoo.checkpoint.hub import locate
from mobazoo.checkpoint.load import Progress
from mobazoo.checkpoint.logits import TOKENS, LogitsReport, compare_logits
from mobazoo.checkpoint.memory import available_memory
from mobazoo.checkpoint.plan import KCONV
from mobazoo.errors import InputError, MobazooError

# What the allocator holds on to of weights that were freed: up to 0.2 GB beyond the rest, seen with 16 layers.
_KEPT = 256 << 20


class VerificationError(MobazooError):
    """A converted folder is not the model it came from; ``problems`` names everything found."""

    def __init__(self, where: object, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        super().__init__(f"{where}: verification failed: {'; '.join(problems[:4])}{more}")


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was proved.

    Attributes:
        equal: tensors with the same bytes.
        cast: tensors equal to the source's, rounded to another dtype.
        added: new tensors, all zero.
        dropped: the source's tensors that are left out, all zero.
        logits: how far apart they are, and what rounding allows.
    """

    equal: int
    cast: int
    added: int
    dropped: int
    logits: LogitsReport


def verify(source: str | Path, dest: str | Path, progress: Progress | None = None) -> VerifyReport:
    """Compares a converted folder with its source, tensor by tensor, and its logits with transformers' own model.

    Weights are streamed, one module in memory at a time. Logits are computed in float32 from the weights as stored in
    ``dest``, so that rounding of the comparison is that of float32 in every dtype.

    Raises:
        VerificationError: with everything that differs.
        InputError: folders that cannot be read, or too little memory.
    """
    return verify_folders(open_folder(locate(source)), open_folder(locate(dest)), progress)


def verify_folders(source: Folder, dest: Folder, progress: Progress | None = None) -> VerifyReport:
    """As ``verify``, for folders that are open."""
    family = family_of(dest.config, dest.path)
    if family.name != family_of(source.config, source.path).name:
        raise VerificationError(dest.path, [f"is a {family.name}, its source {source.config['model_type']}"])
    check_memory(source, family)
    check_fits(dest, skeleton(family.model, zoo_config(family, dest.config, (), dest.path), dest.path))
    problems = [f"config.json: {key} changed" for key in other_changes(source.config, dest.config)]
    counts, wrong = _compare_tensors(source, dest, progress)
    if problems + wrong:
        raise VerificationError(dest.path, problems + wrong)
    logits = compare_logits(source, dest, family)
    if logits.problems:
        raise VerificationError(dest.path, logits.problems)
    return VerifyReport(**counts, logits=logits)


def check_memory(folder: Folder, family: Family) -> None:
    """Refuses before any work is done.

    Raises:
        InputError: the largest module in float32 and its stored form, and the logits, do not fit.
    """
    largest = max((4 * prod(info.shape) for info in folder.tensors.values()), default=0)
    vocabulary = folder.config.get("vocab_size")
    need = _KEPT + 2 * largest + 4 * 4 * TOKENS * (vocabulary if isinstance(vocabulary, int) else 0)
    free = available_memory()
    if free is not None and need > free:
        raise InputError(
            f"{folder.path}: verifying this {family.name} needs {need:,} bytes of memory, {free:,} are available; "
            "free some or pass verify=false"
        )


def _compare_tensors(source: Folder, dest: Folder, progress: Progress | None) -> tuple[dict[str, int], list[str]]:
    counts = {"equal": 0, "cast": 0, "added": 0, "dropped": 0}
    problems, done = [], 0
    for name in (*source.tensors, *(name for name in dest.tensors if name not in source.tensors)):
        kind = _kind(source, dest, name)
        if not _same(source, dest, name, kind):
            problems.append(f"{name} {'differs' if kind in ('equal', 'cast') else 'is not zero but was ' + kind}")
            kind = "wrong"
        if kind in ("missing", "unexpected"):
            problems.append(f"{name} is {kind}")
        if kind in counts:
            counts[kind] += 1
        done += dest.tensors[name].nbytes if name in dest.tensors else 0
        if progress is not None:
            progress("verify", done, dest.nbytes)
    return counts, problems


def _kind(source: Folder, dest: Folder, name: str) -> str:
    old, new = source.tensors.get(name), dest.tensors.get(name)
    if name.endswith(KCONV) and (old is None or new is None or old.shape != new.shape):
        return "added" if new is not None else "dropped"
    if old is None or new is None:
        return "unexpected" if old is None else "missing"
    return "equal" if old.dtype == new.dtype or old.shape != new.shape else "cast"


def _same(source: Folder, dest: Folder, name: str, kind: str) -> bool:
    if kind in ("missing", "unexpected"):
        return True  # reported as such
    if kind in ("added", "dropped"):
        return not any(bool(folder.read(name).any()) for folder in (source, dest) if name in folder.tensors)
    if source.files[name].samefile(dest.files[name]):
        return True
    old, new = source.read(name), dest.read(name)
    if old.shape != new.shape:
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (old.to(new.dtype), new)))
