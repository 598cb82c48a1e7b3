"""Edits of ``config.json``: everything a conversion does not mean to change stays as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mobazoo.checkpoint.family import PREFIX, Family
from mobazoo.config.convert import RopeExtension
from mobazoo.errors import InputError, UnsupportedError

# Where configurations of this and older transformers keep what a context extension changes.
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "max_position_embeddings")
# What else a conversion may change.
IDENTITY_KEYS = ("model_type", "architectures", "moba", "dtype", "torch_dtype", "transformers_version")


def to_zoo(
    config: Mapping[str, Any], family: Family, rules: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The zoo's configuration: our model type, rules without backends (those are chosen when loading), origin."""
    moba = config.get("moba") or {}
    kept = [{key: value for key, value in rule.items() if key != "backend"} for rule in rules]
    origin = dict(provenance)
    if moba.get("provenance"):
        origin["before"] = moba["provenance"]
    edited = {**config, "model_type": PREFIX + family.name, "architectures": [family.model.__name__]}
    edited["moba"] = {"attention": [rule for rule in kept if rule.keys() - {"layers"}], "provenance": origin}
    return edited


def to_hf(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """A plain configuration, as transformers and other programs know it."""
    edited = {**config, "model_type": family.name, "architectures": [family.architecture]}
    edited.pop("moba", None)
    return edited


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The dtype under the keys that are there, else under the current one."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {**config, **dict.fromkeys(keys, dtype)}


def extended(config: Mapping[str, Any], rope: RopeExtension, where: object) -> dict[str, Any]:
    """A longer context; the keys are those the configuration already uses.

    Raises:
        InputError: a factor that extends nothing.
        UnsupportedError: frequencies that are already rescaled; the configuration cannot say both.
    """
    old = config.get("max_position_embeddings")
    current = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = current.get("rope_type", current.get("type", "default"))
    again = kind == rope.type == "linear"  # interpolating twice is interpolating once, by both factors
    if kind != "default" and not again:
        raise UnsupportedError(f"{where}: its rope type is already {kind!r}; only a default rope can be extended")
    if not isinstance(old, int):
        raise InputError(f"{where}: config.json has no max_position_embeddings to extend")
    factor = rope.factor if rope.max_positions is None else rope.max_positions / old
    if factor is None or not 1 < factor < float("inf"):
        raise InputError(f"convert.rope: extends {old} positions by a factor of {factor}; want a factor > 1")
    new: dict[str, Any] = {"rope_type": rope.type, "factor": float(factor) * (current["factor"] if again else 1.0)}
    if rope.type == "yarn":
        new["original_max_position_embeddings"] = old
    edited = {**config, "max_position_embeddings": rope.max_positions or int(old * factor)}
    if "rope_parameters" in config:
        edited["rope_parameters"] = {**(config["rope_parameters"] or {}), **new}
    else:
        edited["rope_scaling"] = new
    return edited


def with_context_of(source: Mapping[str, Any], dest: Mapping[str, Any]) -> dict[str, Any]:
    """``source`` with the context length and rotary scaling of ``dest``."""
    kept = {key: value for key, value in source.items() if key not in ROPE_KEYS}
    return kept | {key: dest[key] for key in ROPE_KEYS if key in dest}


def other_changes(source: Mapping[str, Any], dest: Mapping[str, Any]) -> list[str]:
    """Keys that differ although no conversion changes them."""
    free = {*ROPE_KEYS, *IDENTITY_KEYS}
    return sorted(key for key in (source.keys() | dest.keys()) - free if source.get(key) != dest.get(key))
