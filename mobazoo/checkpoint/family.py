"""From ``config.json`` to classes: which family a checkpoint is, ours and transformers' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from mobazoo.config.rules import join_rules
from mobazoo.config.shipped import MODELS
from mobazoo.errors import InputError, MobazooError, UnsupportedError
from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.nn.decoder import MobaModel

PREFIX = "moba_"

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True, slots=True)
class Family:
    """A family by its Hugging Face model type, with our config, decoder and language model."""

    name: str
    config: type[PreTrainedConfig]
    body: type[MobaModel]
    model: type[MobaForCausalLM]

    @property
    def architecture(self) -> str:
        """Name of transformers' own class, ``LlamaForCausalLM``."""
        return self.model.__name__.removeprefix("Moba")

    @property
    def stock(self) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
        """transformers' own configuration and model."""
        config = self.config.__name__.removeprefix("Moba")
        return getattr(transformers, config), getattr(transformers, self.architecture)


def families() -> dict[str, Family]:
    """Every folder in ``mobazoo.models`` by its name, which is a Hugging Face model type (``llama``, ...)."""
    names = [module.name for module in iter_modules(import_module(MODELS).__path__) if module.ispkg]
    modules = {name: import_module(f"{MODELS}.{name}.model") for name in names}
    return {
        name: Family(name, _own(module, "Config"), _own(module, "Model"), _own(module, "ForCausalLM"))
        for name, module in modules.items()
    }


def _own(module: ModuleType, ending: str) -> Any:
    """The one class of ours in a family's module whose name ends so."""
    (only,) = (
        value
        for name, value in vars(module).items()
        if name.startswith("Moba") and name.endswith(ending) and value.__module__ == module.__name__
    )
    return only


def is_zoo(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is ours, not transformers' own."""
    return str(config.get("model_type")).startswith(PREFIX)


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The family of a checkpoint, plain Hugging Face or zoo.

    Raises:
        UnsupportedError: another architecture, quantised weights, or a model that brings its own code.
    """
    kind = config.get("model_type")
    known = families()
    name = str(kind).removeprefix(PREFIX)
    if name not in known:
        raise UnsupportedError(f"{where}: model_type {kind!r} is not supported; known: {', '.join(known)}")
    if config.get("auto_map"):
        raise UnsupportedError(f"{where}: brings its own code (auto_map in config.json), which is never run")
    if config.get("quantization_config"):
        raise UnsupportedError(f"{where}: quantised weights are not supported; take the checkpoint in bfloat16")
    family = known[name]
    given = config.get("architectures")
    if given and list(given) not in ([family.architecture], [family.model.__name__]):
        raise UnsupportedError(f"{where}: architecture {given[0]!r} is not supported; want {family.architecture}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedError(f"{where}: hidden_act {config['hidden_act']!r} is not supported; {name} uses silu")
    return family


def build_config(
    cls: type[PreTrainedConfig], config: Mapping[str, Any], where: object, part: str = "/config.json"
) -> PreTrainedConfig:
    """A typed configuration; ``part`` of ``where`` is the one that errors name.

    Raises:
        InputError: fields that are missing or of the wrong type.
    """
    try:
        return cls.from_dict({key: value for key, value in config.items() if key != "model_type"})
    except MobazooError as error:
        raise type(error)(f"{where}: {error}") from None
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{where}{part}: {' '.join(str(error).split())}") from None


def zoo_config(
    family: Family, config: Mapping[str, Any], rules: Sequence[Mapping[str, Any]], where: object
) -> PreTrainedConfig:
    """Our typed configuration of a checkpoint's, ``rules`` after its own (``join_rules``)."""
    moba = config.get("moba")
    if moba is not None and not isinstance(moba, Mapping):
        raise InputError(f"{where}/config.json: want an object in moba, got {moba!r}")
    own = (moba or {}).get("attention") or []
    if not isinstance(own, list):
        raise InputError(f"{where}/config.json: want a list in moba.attention, got {own!r}")
    try:
        merged = {**(moba or {}), "attention": join_rules(own, rules)}
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    edited = {**config, "architectures": [family.model.__name__], "moba": merged}
    return build_config(family.config, edited, where)


def skeleton(cls: type[Model], config: PreTrainedConfig, where: object, part: str = "/config.json") -> Model:
    """A model whose parameters are on ``meta`` and whose buffers (rotary frequencies) are real.

    Raises:
        UnsupportedError: a rope type we do not have.
        InputError: a configuration no model can be built from.
    """
    try:
        with torch.device("meta"):
            model = cls(config)
        for name, module in list(model.named_modules()):
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                model.set_submodule(name, type(module)(config))
    except MobazooError as error:
        raise type(error)(f"{where}: {error}") from None
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(f"{where}{part} describes no model: {' '.join(str(error).split())[:200]}") from None
    return model.eval()
