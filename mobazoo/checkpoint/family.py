"""From ``config.json`` to classes: which family a checkpoint is, ours and transformers' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from mobazoo.errors import InputError, MobazooError, UnsupportedError
from mobazoo.nn.causal_lm import MobaForCausalLM

PREFIX = "moba_"
_ZOO = "mobazoo.models"

Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass(frozen=True, slots=True)
class Family:
    """A family by its Hugging Face model type, with our config and model class."""

    name: str
    config: type[PreTrainedConfig]
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


def is_zoo(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is ours, not transformers' own."""
    return str(config.get("model_type")).startswith(PREFIX)


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The family of a checkpoint, plain Hugging Face or zoo.

    Raises:
        UnsupportedError: another architecture, quantised weights, or a model that brings its own code.
    """
    kind = config.get("model_type")
    known = sorted(info.name for info in iter_modules(import_module(_ZOO).__path__) if info.ispkg)
    name = str(kind).removeprefix(PREFIX)
    if name not in known:
        raise UnsupportedError(f"{where}: model_type {kind!r} is not supported; known: {', '.join(known)}")
    if config.get("auto_map"):
        raise UnsupportedError(f"{where}: brings its own code (auto_map in config.json), which is never run")
    if config.get("quantization_config"):
        raise UnsupportedError(f"{where}: quantised weights are not supported; take the checkpoint in bfloat16")
    module = import_module(f"{_ZOO}.{name}.model")
    own = [
        value for key, value in vars(module).items() if key.startswith("Moba") and value.__module__ == module.__name__
    ]
    (config_class,) = (value for value in own if value.__name__.endswith("Config"))
    (model_class,) = (value for value in own if value.__name__.endswith("ForCausalLM"))
    family = Family(name, config_class, model_class)
    given = config.get("architectures")
    if given and list(given) not in ([family.architecture], [model_class.__name__]):
        raise UnsupportedError(f"{where}: architecture {given[0]!r} is not supported; want {family.architecture}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UnsupportedError(f"{where}: hidden_act {config['hidden_act']!r} is not supported; {name} uses silu")
    return family


def build_config(cls: type[PreTrainedConfig], config: Mapping[str, Any], where: object) -> PreTrainedConfig:
    """A typed configuration.

    Raises:
        InputError: fields that are missing or of the wrong type.
    """
    try:
        return cls.from_dict({key: value for key, value in config.items() if key != "model_type"})
    except MobazooError as error:
        raise type(error)(f"{where}: {error}") from None
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f"{where}/config.json: {' '.join(str(error).split())}") from None


def zoo_config(
    family: Family, config: Mapping[str, Any], rules: Sequence[Mapping[str, Any]], where: object
) -> PreTrainedConfig:
    """Our typed configuration of a checkpoint's, ``rules`` after its own."""
    moba = config.get("moba")
    if moba is not None and not isinstance(moba, Mapping):
        raise InputError(f"{where}/config.json: want an object in moba, got {moba!r}")
    own = (moba or {}).get("attention") or []
    if not isinstance(own, list):
        raise InputError(f"{where}/config.json: want a list in moba.attention, got {own!r}")
    merged = {**(moba or {}), "attention": [*own, *(dict(rule) for rule in rules)]}
    edited = {**config, "architectures": [family.model.__name__], "moba": merged}
    return build_config(family.config, edited, where)


def skeleton(cls: type[Model], config: PreTrainedConfig, where: object) -> Model:
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
        raise InputError(f"{where}/config.json describes no model: {' '.join(str(error).split())[:200]}") from None
    return model.eval()
