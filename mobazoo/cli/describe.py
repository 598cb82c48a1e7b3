"""What ``mobazoo show`` says of a model, from its configuration alone: no tensor is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from mobazoo.attention.pattern import Full, MoBA
from mobazoo.checkpoint.family import family_of, skeleton, zoo_config
from mobazoo.checkpoint.folder import CONFIG, inside, read_json
from mobazoo.checkpoint.hub import locate
from mobazoo.checkpoint.ready import chosen
from mobazoo.cli.output import count, size, tokens
from mobazoo.config.dtypes import DTYPES
from mobazoo.config.models import model_entry, model_names
from mobazoo.config.recipe import parse_recipe
from mobazoo.config.rules import LayerAttention
from mobazoo.config.shipped import Source
from mobazoo.errors import InputError
from mobazoo.explain import backend_of, centroid_bytes, groups, kv_bytes, share_read
from mobazoo.zoo import build, make_config

LENGTHS = (8 << 10, 128 << 10, 1 << 20)
HEADER = ("layers", "count", "pattern", "block", "top_k", "decode", "kconv", "backend", "why")


@dataclass(frozen=True)
class Described:
    """A model in facts and a table of its layers."""

    name: str
    facts: list[tuple[str, str]]
    rows: list[tuple[Any, ...]]


@dataclass
class Rules:
    """What ``key=value`` may say for a checkpoint that is only looked at: rules after its own, as for any verb."""

    attention: list[dict[str, Any]] = field(default_factory=list)


def describe(target: str, overrides: Sequence[str], device: str, dtype: str | None) -> Described:
    """A model of the zoo by name or file, or a checkpoint by folder or Hub id, with ``overrides``.

    Args:
        target: what ``mobazoo models`` lists, a model file, a folder, or a Hub id.
        overrides: keys of the model file, or ``attention`` with rules after a checkpoint's own.
        device: ``auto``, ``cpu`` or ``cuda``, for the choice of backends.
        dtype: of the cache and for the choice of backends (None: the checkpoint's, bfloat16 if it says none).

    Raises:
        InputError: no such model, or a setting that no model could have.
    """
    config, model = _from_zoo(target, overrides) if _is_entry(target) else _from_folder(target, overrides)
    layers: tuple[LayerAttention, ...] = config.attention_layers()
    kind, where = dtype_of(dtype or config.dtype or "bfloat16"), device_of(device)
    length = config.max_position_embeddings
    head_dim, key_heads = config.head_dim, config.num_key_value_heads
    per_token = kv_bytes(len(layers), key_heads, head_dim, kind)
    name = str(kind).removeprefix("torch.")
    facts = [
        ("parameters", count(model.num_parameters())),
        ("layers", str(len(layers))),
        ("heads", f"{config.num_attention_heads} query, {key_heads} key, dim {head_dim}"),
        ("context", f"{tokens(length)} tokens"),
        ("KV cache per token", f"{per_token} bytes in {name}"),
        ("centroids per token", f"{float(centroid_bytes(layers, key_heads, head_dim, kind)):.3g} bytes in {name}"),
        ("KV cache at full context", size(per_token * length)),
    ]
    facts += [
        (f"keys read in a prefill of {tokens(n)}", f"{float(100 * share_read(layers, n)):.3g} %") for n in LENGTHS
    ]
    facts.append(("backends", f"for a prefill of {tokens(length)} in {name} on {where}"))
    rows = [
        (which, number, *_cells(layer), *backend_of(layer, length, head_dim, kind, where))
        for which, number, layer in groups(layers)
    ]
    return Described(target, facts, rows)


def config_of(target: str) -> PreTrainedConfig:
    """The configuration of a model by name, file, folder or Hub id.

    Raises:
        InputError: no such model.
    """
    return (_from_zoo(target, ()) if _is_entry(target) else _from_folder(target, ()))[0]


def _is_entry(target: str) -> bool:
    file = Path(target).is_file() or target.endswith(".yaml") or ("/" not in target and not Path(target).is_dir())
    return target in model_names() or file


def _from_zoo(name: str, overrides: Sequence[str]) -> tuple[PreTrainedConfig, PreTrainedModel]:
    entry = model_entry(name, overrides)
    return make_config(entry), build(entry)


def _from_folder(target: str, overrides: Sequence[str]) -> tuple[PreTrainedConfig, PreTrainedModel]:
    folder = locate(target)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: not a checkpoint folder: it has no {CONFIG}")
    said = read_json(inside(folder, CONFIG))
    family = family_of(said, folder)
    rules = parse_recipe(Source(target, target, "{}"), overrides, Rules).attention
    config = zoo_config(family, said, rules, folder)
    return config, skeleton(family.model, config, folder)


def _cells(layer: LayerAttention) -> tuple[Any, ...]:
    pattern = layer.pattern
    sizes = (pattern.block_size, pattern.top_k) if isinstance(pattern, MoBA) else (None, None)
    return ("full" if isinstance(pattern, Full) else "moba", *sizes, layer.decode, layer.kconv or None)


def device_of(name: str) -> str:
    """``auto`` or a device by name, as its type.

    Raises:
        InputError: no device.
    """
    try:
        return torch.device(chosen(name)).type
    except RuntimeError:
        raise InputError(f"--device: want auto, cpu or cuda, got {name!r}") from None


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """A dtype by name.

    Raises:
        InputError: another than models are stored in.
    """
    short = str(name).removeprefix("torch.")
    if short not in DTYPES:
        raise InputError(f"--dtype: want one of {', '.join(DTYPES)}, got {short!r}")
    found: torch.dtype = getattr(torch, short)
    return found
