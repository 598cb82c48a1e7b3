"""What a run starts from: model and tokenizer, checked against each other before any data is read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mobazoo._version import __version__
from mobazoo.checkpoint.family import Family, family_of, skeleton, zoo_config
from mobazoo.checkpoint.folder import open_folder
from mobazoo.checkpoint.hub import locate
from mobazoo.checkpoint.load import load
from mobazoo.checkpoint.tokenizer import load_tokenizer
from mobazoo.config.keys import refuse_unknown
from mobazoo.config.models import ModelEntry, model_entry, model_names
from mobazoo.config.recipe import plain
from mobazoo.config.rules import Rule
from mobazoo.config.train import TrainRecipe
from mobazoo.data.tokens import Progress
from mobazoo.errors import InputError
from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.train.lora import check_targets
from mobazoo.train.schedule import AttentionSchedule, Rules


@dataclass(frozen=True, slots=True)
class Setup:
    """A model to be: nothing of its weights is in memory.

    Attributes:
        family: its classes.
        config: with the recipe's rules.
        tokenizer: that fits it.
        schedule: which rules hold when.
        random: whether it starts with random weights.
        parameters: trainable numbers, tied ones once.
    """

    family: Family
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    schedule: AttentionSchedule
    random: bool
    parameters: int

    @property
    def rules(self) -> Rules:
        """The rules of the whole run, which those of its stages come after."""
        rules: tuple[Rule, ...] = self.config.attention_rules()
        return [rule.as_dict() for rule in rules]


def prepare(recipe: TrainRecipe) -> Setup:
    """Reads configuration, headers and tokenizer of what the recipe names.

    Raises:
        InputError: no such model or tokenizer, or a recipe that does not fit them.
        UnsupportedError: a model the zoo does not have.
    """
    recipe.check()
    random = recipe.model in model_names()
    family, config = _of_zoo(recipe, model_entry(recipe.model)) if random else _of_folder(recipe)
    if random and recipe.tokenizer is None:
        raise InputError(f"train.tokenizer: {recipe.model} starts with random weights and has none; name a folder")
    tokenizer = load_tokenizer(recipe.tokenizer or recipe.model)
    _check_fit(recipe, config, tokenizer)
    model = skeleton(family.model, config, recipe.model)
    if recipe.lora is not None:
        check_targets(model, recipe.lora)
    rules = [rule.as_dict() for rule in config.attention_rules()]
    schedule = AttentionSchedule(recipe, rules, config.num_hidden_layers)
    if recipe.to == "hf" and not schedule.ends_plain:
        raise InputError(
            "train.to: a plain Hugging Face checkpoint has full attention without kconv in every layer; end the run "
            "with it (attention=[{pattern: full}], or a last stage of it), or set to=zoo"
        )
    return Setup(family, config, tokenizer, schedule, random, model.num_parameters())


def make_model(
    setup: Setup, recipe: TrainRecipe, progress: Progress | None = None, resumed: Path | None = None
) -> MobaForCausalLM:
    """The model with its weights, in the recipe's dtype, on the CPU.

    Args:
        setup: what ``prepare`` found.
        recipe: of the run.
        progress: told ``("load", bytes read, bytes in all)``.
        resumed: a checkpoint of the run to take the weights from.
    """
    dtype: torch.dtype = getattr(torch, recipe.dtype)
    if resumed is not None:
        model = load(resumed, dtype=dtype, device="cpu", progress=progress)
        model.config.moba = dict(setup.config.moba)  # its provenance is of this very run
    elif setup.random:
        torch.manual_seed(recipe.seed)
        setup.config.dtype = dtype
        model = setup.family.model(setup.config)
        nn.Module.to(model, dtype=dtype)  # transformers' own is typed away
    else:
        model = load(recipe.model, attention=recipe.attention, dtype=dtype, device="cpu", progress=progress)
    model.config.use_cache = False
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _of_zoo(recipe: TrainRecipe, entry: ModelEntry) -> tuple[Family, PreTrainedConfig]:
    family = family_of({"model_type": entry.family}, recipe.model)
    known = [item.name for item in fields(family.config) if item.name != "moba"]
    refuse_unknown(recipe.config, known, "train.config")
    said: dict[str, Any] = {**entry.config, **recipe.config, "moba": {"attention": entry.attention}}
    return family, zoo_config(family, said, recipe.attention, recipe.model)


def _of_folder(recipe: TrainRecipe) -> tuple[Family, PreTrainedConfig]:
    if recipe.config:
        raise InputError(
            f"train.config: only a model of the zoo can be changed, and {recipe.model} is a checkpoint; "
            "change one by mobazoo convert"
        )
    folder = open_folder(locate(recipe.model))
    family = family_of(folder.config, folder.path)
    return family, zoo_config(family, folder.config, recipe.attention, folder.path)


def _check_fit(recipe: TrainRecipe, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    if recipe.length > config.max_position_embeddings:
        raise InputError(
            f"train.length: {recipe.length}, but the model has {config.max_position_embeddings} positions; shorten the "
            "rows, or convert the model to a longer context"
        )
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"train.tokenizer: has {len(tokenizer)} tokens, the model {config.vocab_size}; "
            "name the model's own, or set config.vocab_size of a model with random weights"
        )
    if not isinstance(tokenizer.eos_token_id, int):
        raise InputError("train.tokenizer: has no end token (eos_token), which ends each document; set one and save it")
    chats = [data for data in (recipe.data, recipe.validation) if data is not None and data.messages is not None]
    if chats and not tokenizer.chat_template:
        raise InputError("train.tokenizer: has no chat template, which data.messages needs; set one and save it")


def provenance(recipe: TrainRecipe, setup: Setup) -> dict[str, Any]:
    """How the weights came about; no folder of this machine is in it."""
    asked = plain(recipe)
    for key in ("dest", "overwrite", "tokenizer"):
        del asked[key]
    for key in ("data", "validation"):
        if asked[key]:
            asked[key]["path"] = Path(asked[key]["path"]).name
    return {
        "trained_from": "random weights" if setup.random else Path(recipe.model).name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": {"mobazoo": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "recipe": {**asked, "model": Path(recipe.model).name},
    }
