"""The zoo's families, their registration with transformers, and models from the zoo's files."""

from __future__ import annotations

from dataclasses import fields
from functools import wraps
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from mobazoo.checkpoint import load as checkpoint
from mobazoo.checkpoint.family import build_config, families, skeleton
from mobazoo.config.keys import nearest, refuse_unknown
from mobazoo.config.models import ModelEntry
from mobazoo.errors import InputError
from mobazoo.integrations.transformers import moba_attention, moba_mask, moba_naive_attention
from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.nn.config import MobaConfigMixin


def family_class(family: str, part: str) -> type:
    """A family's ``Config``, ``Model`` or ``ForCausalLM``.

    Raises:
        InputError: no such family, with the nearest one.
    """
    known = families()
    if family not in known:
        raise InputError(f"family {family!r} is not in the zoo; {nearest(family, known)}")
    found = known[family]
    kinds: dict[str, type] = {"Config": found.config, "Model": found.body, "ForCausalLM": found.model}
    return kinds[part]


def register() -> None:
    """Makes transformers know the zoo: Auto classes for ``moba_*`` types, attention ``moba`` and ``moba_naive``.

    Once is enough, more does nothing.
    """
    for name, attention in (("moba", moba_attention), ("moba_naive", moba_naive_attention)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, moba_mask)
    for family in families().values():
        AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
        AutoModel.register(family.config, family.body, exist_ok=True)
        AutoModelForCausalLM.register(family.config, family.model, exist_ok=True)


def make_config(entry: ModelEntry) -> MobaConfigMixin:
    """The config of a zoo entry.

    Raises:
        InputError: an unknown family or a field that its config does not have (with the nearest one), a value that no
            model has, or rules that do not resolve.
    """
    try:
        kind: Any = family_class(entry.family, "Config")
    except InputError as error:
        raise InputError(f"model {entry.name}: {error}") from None
    known = [field.name for field in fields(kind) if field.name != "moba"]
    refuse_unknown(entry.config, known, f"model {entry.name}.config")
    said = {**entry.config, "moba": {"attention": entry.attention}}
    config: Any = build_config(kind, said, f"model {entry.name}", ".config")
    return config


def build(entry: ModelEntry, device: torch.device | str = "meta") -> MobaForCausalLM:
    """A model of a zoo entry with random weights, or on ``meta`` (the default) with none.

    Example:
        >>> build(model_entry("llama3.1-8b", ["attention=[]"])).num_parameters()
        8030261248
    """
    config = make_config(entry)
    kind = families()[entry.family].model
    empty = skeleton(kind, config, f"model {entry.name}", ".config")  # refuses what no model can be made from
    if torch.device(device).type == "meta":
        return empty
    with torch.device(device):
        return kind(config)


@wraps(checkpoint.load)
def load(*args: Any, **kwargs: Any) -> MobaForCausalLM:
    """``mobazoo.checkpoint.load.load`` with the zoo registered, so that what it returns can be found again."""
    register()
    return checkpoint.load(*args, **kwargs)
