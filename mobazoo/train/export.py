"""A trained model as a checkpoint folder that appears complete or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from mobazoo.checkpoint.compare import HEAD
from mobazoo.checkpoint.edit import to_hf
from mobazoo.checkpoint.family import Family
from mobazoo.checkpoint.folder import CONFIG, read_json
from mobazoo.checkpoint.manifest import write_manifest
from mobazoo.checkpoint.place import METRICS
from mobazoo.checkpoint.staging import staged
from mobazoo.checkpoint.write import write_json
from mobazoo.nn.causal_lm import MobaForCausalLM


def write_model(
    model: MobaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    provenance: dict[str, Any],
    state: dict[str, Tensor] | None = None,
) -> None:
    """Writes configuration, weights and tokenizer into a folder that is there.

    Args:
        model: whose configuration to write.
        tokenizer: to write beside it.
        folder: to write to.
        provenance: put into the configuration's ``moba``; an earlier one is kept inside.
        state: weights (None: the model's own).
    """
    config = model.config
    if state is not None and config.tie_word_embeddings:
        state.pop(HEAD, None)
    before, cached = config.moba, config.use_cache
    moba = dict(before or {"attention": []})
    origin = {**provenance, **({"before": moba["provenance"]} if moba.get("provenance") else {})}
    config.moba, config.use_cache = {**moba, "provenance": origin}, True
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        config.moba, config.use_cache = before, cached
        if bars:
            logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)


def export(
    model: MobaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    dest: Path,
    provenance: dict[str, Any],
    *,
    metrics: Path,
    plain: Family | None = None,
    replace: bool = False,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Puts the finished model in place.

    Args:
        model: to write.
        tokenizer: to write.
        dest: folder that appears.
        provenance: see ``write_model``.
        metrics: file to keep beside the weights.
        plain: the family, to write a plain Hugging Face checkpoint instead of one of the zoo.
        replace: whether a checkpoint at ``dest`` may go.
        state: see ``write_model``.
    """
    with staged(dest, replace=replace) as new:
        write_model(model, tokenizer, new, provenance, state)
        if plain is not None:
            write_json(new / CONFIG, to_hf(read_json(new / CONFIG), plain, dest))
        shutil.copyfile(metrics, new / METRICS)
        write_manifest(new)
