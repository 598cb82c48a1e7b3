"""The zoo's families, and their registration with transformers."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

import mobazoo.models
from mobazoo.integrations.transformers import moba_attention, moba_mask, moba_naive_attention


def families() -> dict[str, ModuleType]:
    """The model module of every folder in ``mobazoo.models``, by its Hugging Face model type (``llama``, ...)."""
    names = [module.name for module in iter_modules(mobazoo.models.__path__) if module.ispkg]
    return {name: import_module(f"mobazoo.models.{name}.model") for name in names}


def register() -> None:
    """Makes transformers know the zoo: Auto classes for ``moba_*`` types, attention ``moba`` and ``moba_naive``.

    Once is enough, more does nothing.
    """
    for name, attention in (("moba", moba_attention), ("moba_naive", moba_naive_attention)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, moba_mask)
    for module in families().values():
        classes = {part: _class(module, part) for part in ("Config", "Model", "ForCausalLM")}
        config: type[PreTrainedConfig] = classes["Config"]
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, classes["Model"], exist_ok=True)
        AutoModelForCausalLM.register(config, classes["ForCausalLM"], exist_ok=True)


def _class(module: ModuleType, part: str) -> type:
    """The one class a family defines that ends in ``part``."""
    found = [
        value
        for name, value in vars(module).items()
        if name.startswith("Moba") and name.endswith(part) and value.__module__ == module.__name__
    ]
    (only,) = found
    return only
