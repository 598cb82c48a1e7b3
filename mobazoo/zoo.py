"""The zoo's families, their registration with transformers, and models from the zoo's files."""

from __future__ import annotations

from dataclasses import fields
from functools import wraps
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from mobazoo.checkpoint import load as checkpoint
from mobazoo.config.keys import refuse_unknown
from mobazoo.config.models import PACKAGE, ModelEntry
from mobazoo.integrations.transformers import moba_attention, moba_mask, moba_naive_attention
from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.nn.config import MobaConfigMixin


def families() -> dict[str, ModuleType]:
    """The model module of every folder in ``mobazoo.models``, by its Hugging Face model type (``llama``, ...)."""
    package = import_module(PACKAGE)
    names = [module.name for module in iter_modules(package.__path__) if module.ispkg]
    return {name: import_module(f"{PACKAGE}.{name}.model") for name in names}


def family_class(family: str, part: str) -> type:
    """The one class of a family that ends in ``part``: ``Config``, ``Model`` or ``ForCausalLM``."""
    module = families()[family]
    found: list[type] = [
        value
        for name, value in vars(module).items()
        if name.startswith("Moba") and name.endswith(part) and value.__module__ == module.__name__
    ]
    (only,) = found
    return only


def register() -> None:
    """Makes transformers know the zoo: Auto classes for ``moba_*`` types, attention ``moba`` and ``moba_naive``.

    Once is enough, more does nothing.
    """
    for name, attention in (("moba", moba_attention), ("moba_naive", moba_naive_attention)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, moba_mask)
    for family in families():
        config: type[PreTrainedConfig] = family_class(family, "Config")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, family_class(family, "Model"), exist_ok=True)
        AutoModelForCausalLM.register(config, family_class(family, "ForCausalLM"), exist_ok=True)


def make_config(entry: ModelEntry) -> MobaConfigMixin:
    """The config of a zoo entry.

    Raises:
        InputError: a field that the family's config does not have (with the nearest one), or rules that do not resolve.
    """
    kind: Any = family_class(entry.family, "Config")
    known = [field.name for field in fields(kind) if field.name != "moba"]
    refuse_unknown(entry.config, known, f"model {entry.name}.config")
    config: MobaConfigMixin = kind(**entry.config, moba={"attention": entry.attention})
    return config


def build(entry: ModelEntry, device: torch.device | str = "meta") -> MobaForCausalLM:
    """A model of a zoo entry with random weights, or on ``meta`` (the default) with none.

    Example:
        >>> build(model_entry("llama3.1-8b", ["attention=[]"])).num_parameters()
        8030261248
    """
    kind: Any = family_class(entry.family, "ForCausalLM")
    with torch.device(device):
        model: MobaForCausalLM = kind(make_config(entry))
    return model


@wraps(checkpoint.load)
def load(*args: Any, **kwargs: Any) -> MobaForCausalLM:
    """``mobazoo.checkpoint.load.load`` with the zoo registered, so that what it returns can be found again."""
    register()
    return checkpoint.load(*args, **kwargs)
