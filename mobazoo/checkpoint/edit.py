"""Edits of ``config.json``: everything a conversion does not mean to change stays as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mobazoo.checkpoint.family import PREFIX, Family
from mobazoo.config.convert import RopeExtension
from mobazoo.config.rope import RopeStep
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
    edited["moba"] = {"attention": [rule for rule in kept if rule.keys() - {"layers"}]}
    if moba.get("rope"):
        edited["moba"]["rope"] = moba["rope"]
    edited["moba"]["provenance"] = origin
    return edited


def to_hf(config: Mapping[str, Any], family: Family, where: object) -> dict[str, Any]:
    """A plain configuration, as transformers and other programs know it.

    Raises:
        UnsupportedError: a context that was extended in a way that only the zoo's configuration can say.
    """
    if (config.get("moba") or {}).get("rope"):
        kind = _scaling(config)["rope_type"]
        raise UnsupportedError(
            f"{where}: its context was extended over a {kind} rope, which a plain Hugging Face config cannot say; keep "
            "it a zoo checkpoint, or convert the one it came from"
        )
    edited = {**config, "model_type": family.name, "architectures": [family.architecture]}
    edited.pop("moba", None)
    return edited


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The dtype under the keys that are there, else under the current one."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return {**config, **dict.fromkeys(keys, dtype)}


def extended(config: Mapping[str, Any], rope: RopeExtension, where: object) -> dict[str, Any]:
    """A longer context; the keys are those the configuration already uses.

    A plain rope, and one of the same type, is said as transformers says it, the factors multiplied; any other becomes a
    step in ``moba.rope``.

    Raises:
        InputError: a factor that extends nothing.
        UnsupportedError: a yarn whose magnitude was set by hand.
    """
    old, current = config.get("max_position_embeddings"), _scaling(config)
    kind, steps = current["rope_type"], (config.get("moba") or {}).get("rope")
    if not isinstance(old, int):
        raise InputError(f"{where}: config.json has no max_position_embeddings to extend")
    factor = rope.factor if rope.max_positions is None else rope.max_positions / old
    if factor is None or not 1 < factor < float("inf"):
        raise InputError(f"convert.rope: extends {old} positions by a factor of {factor}; want a factor > 1")
    edited = {**config, "max_position_embeddings": rope.max_positions or int(old * factor)}
    new: dict[str, Any] = {}
    if kind in ("yarn", "llama3"):  # transformers would take the new context for the original one
        new["original_max_position_embeddings"] = current.get("original_max_position_embeddings", old)
    if steps or kind not in ("default", rope.type):
        step = asdict(RopeStep(rope.type, float(factor), old))
        edited["moba"] = {**(config.get("moba") or {}), "rope": [*(steps or ()), step]}
    elif current.get("attention_factor") is not None:
        raise UnsupportedError(
            f"{where}: its yarn says attention_factor={current['attention_factor']}, which is for the context it has; "
            "take it out of config.json to have it computed for the longer one"
        )
    else:
        original = new.setdefault("original_max_position_embeddings", old)
        before = (current.get("factor") or old / original) if kind == rope.type else 1.0
        new |= {"rope_type": rope.type, "factor": before * float(factor)}
        if rope.type == "linear":
            del new["original_max_position_embeddings"]
    if new:
        edited |= _with_scaling(config, {key: value for key, value in current.items() if key != "type"} | new)
    return edited


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary scaling, under its current name for the type."""
    said = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    return {**said, "rope_type": said.get("rope_type", said.get("type", "default"))}


def _with_scaling(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_parameters" if "rope_parameters" in config else "rope_scaling": dict(scaling)}


def with_context_of(source: Mapping[str, Any], dest: Mapping[str, Any]) -> dict[str, Any]:
    """``source`` with the context length and rotary scaling of ``dest``."""
    kept = {key: value for key, value in source.items() if key not in ROPE_KEYS}
    steps = (dest.get("moba") or {}).get("rope")
    moba = {"moba": {**(source.get("moba") or {}), "rope": steps}} if steps else {}
    return kept | moba | {key: dest[key] for key in ROPE_KEYS if key in dest}


def without_steps(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the extensions of ``moba.rope``, as far as transformers computes it."""
    return {**config, "moba": {**(config.get("moba") or {}), "rope": []}}


def other_changes(source: Mapping[str, Any], dest: Mapping[str, Any]) -> list[str]:
    """Keys that differ although no conversion changes them."""
    free = {*ROPE_KEYS, *IDENTITY_KEYS}
    return sorted(key for key in (source.keys() | dest.keys()) - free if source.get(key) != dest.get(key))
