"""``convert``: a Hugging Face folder to a zoo folder and back. No tensor changes unless the recipe asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any

from mobazoo._version import __version__
from mobazoo.checkpoint.compare import check_fits, expected
from mobazoo.checkpoint.edit import extended, to_hf, to_zoo, with_dtype
from mobazoo.checkpoint.family import Family, family_of, skeleton, zoo_config
from mobazoo.checkpoint.folder import CONFIG, Folder, open_folder
from mobazoo.checkpoint.hub import locate, provenance_name
from mobazoo.checkpoint.load import Progress, check_tied
from mobazoo.checkpoint.manifest import write_manifest
from mobazoo.checkpoint.place import free_place
from mobazoo.checkpoint.plan import Plan, make_plan
from mobazoo.checkpoint.staging import staged
from mobazoo.checkpoint.verify import VerifyReport, check_memory, verify_folders
from mobazoo.checkpoint.write import copy_small, new_bytes, raise_limit, write_json, write_shards
from mobazoo.config.convert import ConvertRecipe
from mobazoo.errors import InputError


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did.

    Attributes:
        dest: the folder that is now there.
        tensors: tensors in it.
        nbytes: their bytes.
        linked: weight files that share the source's bytes on disk.
        copied: weight files copied as they are.
        written: weight files written anew.
        added: names of new tensors (zero key convolutions).
        dropped: names of tensors left out (zero key convolutions).
        verified: what was proved (None: the recipe said not to).
        seconds: time taken.
    """

    dest: Path
    tensors: int
    nbytes: int
    linked: int
    copied: int
    written: int
    added: tuple[str, ...]
    dropped: tuple[str, ...]
    verified: VerifyReport | None
    seconds: float


@dataclass(frozen=True, slots=True)
class _Job:
    """A conversion that is known to be possible; nothing has been written."""

    folder: Folder
    family: Family
    config: dict[str, Any]
    plan: Plan


def convert(recipe: ConvertRecipe, progress: Progress | None = None) -> ConvertReport:
    """Converts a checkpoint. ``recipe.dest`` appears complete, or stays as it was.

    Args:
        recipe: what to do.
        progress: told ``(stage, bytes done, bytes in all)`` for the stages ``write``, ``sums`` and ``verify``.

    Raises:
        InputError: a source or recipe that cannot be used, a ``dest`` that exists, a full disk, short memory.
        UnsupportedError: an architecture, rope type or key convolution that the result cannot have.
        VerificationError: the result is not what it should be; nothing was put in place.
    """
    started = monotonic()
    recipe.check()
    dest = free_place(recipe.dest, recipe.overwrite)
    job = _prepare(recipe)
    _apart(job.folder.path, dest)
    _room(job.plan, dest)
    if recipe.verify:
        check_memory(job.folder, job.family)
    verified = None
    with staged(dest, replace=recipe.overwrite) as new:
        counts = write_shards(job.folder, job.plan, new, _Counter(progress, "write", job.plan.nbytes))
        copy_small(job.folder.path, new)
        if recipe.rope is not None:
            raise_limit(new, job.config["max_position_embeddings"])
        write_json(new / CONFIG, job.config)
        total = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
        write_manifest(new, _Counter(progress, "sums", total))
        if recipe.verify:
            verified = verify_folders(job.folder, open_folder(new), progress)
    tensors = sum(len(shard.pieces) for shard in job.plan.shards)
    return ConvertReport(
        dest=dest,
        tensors=tensors,
        nbytes=job.plan.nbytes,
        **counts,
        added=job.plan.added,
        dropped=job.plan.dropped,
        verified=verified,
        seconds=monotonic() - started,
    )


def plan_convert(recipe: ConvertRecipe) -> Plan:
    """Everything ``convert`` checks and decides before it writes; a dry run.

    Raises:
        InputError, UnsupportedError: as ``convert``.
    """
    recipe.check()
    dest = free_place(recipe.dest, recipe.overwrite)
    job = _prepare(recipe)
    _apart(job.folder.path, dest)
    _room(job.plan, dest)
    return job.plan


def _prepare(recipe: ConvertRecipe) -> _Job:
    folder = open_folder(locate(recipe.source, recipe.revision))
    where = folder.path
    family = family_of(folder.config, where)
    stored = skeleton(family.model, zoo_config(family, folder.config, (), where), where)
    check_fits(folder, stored)
    check_tied(folder, tied=stored.config.tie_word_embeddings)
    edited = extended(folder.config, recipe.rope, where) if recipe.rope else folder.config
    if recipe.dtype:
        edited = with_dtype(edited, recipe.dtype)
    if recipe.to == "zoo":
        typed = zoo_config(family, edited, recipe.attention, where)
        rules = [rule.as_dict() for rule in typed.attention_rules()]
        edited = to_zoo(edited, family, rules, _provenance(recipe, folder))
        model = skeleton(family.model, typed, where)
    else:
        edited = to_hf(edited, family, where)
        model = skeleton(family.model, zoo_config(family, edited, (), where), where)
    return _Job(folder, family, edited, make_plan(folder, expected(model), recipe.dtype, recipe.max_shard_size))


def _provenance(recipe: ConvertRecipe, folder: Folder) -> Mapping[str, Any]:
    """Where the weights come from; names only, since folders of one machine mean nothing on another."""
    asked = asdict(recipe)
    for key in ("source", "dest", "overwrite", "revision"):
        del asked[key]
    return {
        "source": provenance_name(folder.path),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"mobazoo": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "recipe": {key: value for key, value in asked.items() if value not in (None, [])},
    }


def _apart(source: Path, dest: Path) -> None:
    real = source.resolve()
    if real != dest and (real.is_relative_to(dest) or dest.is_relative_to(real)):
        raise InputError(f"{dest}: source and dest may not lie in one another; choose another dest")


def _room(plan: Plan, dest: Path) -> None:
    need = new_bytes(plan, dest)
    place = next(parent for parent in dest.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise InputError(f"{dest}: disk full: {need:,} bytes to write, {free:,} free; choose another dest")


class _Counter:
    """A running sum of bytes, told to a ``Progress``."""

    def __init__(self, progress: Progress | None, stage: str, total: int) -> None:
        self.progress, self.stage, self.total, self.sum = progress, stage, total, 0

    def __call__(self, nbytes: int) -> None:
        self.sum += nbytes
        if self.progress is not None:
            self.progress(self.stage, self.sum, self.total)
