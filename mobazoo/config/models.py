"""The zoo's model files: what ``models/<family>/<name>.yaml``, or one of your own, may say. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mobazoo.config.recipe import parse_recipe
from mobazoo.config.shipped import MODELS, Source, find, shipped


@dataclass(frozen=True)
class ModelFile:
    """The keys of a model file.

    Attributes:
        family: the Hugging Face model type, such as ``llama``.
        config: the fields of the family's Hugging Face config that differ from its defaults.
        attention: per-layer rules; ``[]`` is full attention everywhere.
        source: Hub id of the weights (None: there are none, the model is for experiments).
        licence: of the weights at ``source``, or of the file where there are none.
        parameters: trainable numbers, tied ones once; a test counts those of the files that are shipped.
    """

    family: str
    config: dict[str, Any]
    attention: list[dict[str, Any]] = field(default_factory=list)
    source: str | None = None
    licence: str | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class ModelEntry(ModelFile):
    """A model file with its ``name``, which is the file's without ``.yaml``."""

    name: str = ""


def model_names() -> tuple[str, ...]:
    """Names of all shipped model files, family by family."""
    return tuple(name.rpartition("/")[2] for name in shipped(MODELS))


def model_entry(name: str | Path, overrides: Sequence[str] = ()) -> ModelEntry:
    """Reads a model file.

    Args:
        name: one of ``model_names()``, or the path of a file.
        overrides: ``key=value`` with YAML values, applied to the file; ``attention[0].top_k=4`` reaches into lists and
            ``attention=[]`` is the same model with full attention.

    Raises:
        InputError: no such file (with the nearest name), an unknown key (with the nearest known one), a missing or
            mistyped field, ``${...}``, or rules that no layer could use.
    """
    return parse_entry(find(name, MODELS), overrides)


def parse_entry(source: Source, overrides: Sequence[str] = ()) -> ModelEntry:
    """``model_entry`` for a text that is already here."""
    said = parse_recipe(source, overrides, ModelFile)
    return ModelEntry(**vars(said), name=source.name.rpartition("/")[2])
