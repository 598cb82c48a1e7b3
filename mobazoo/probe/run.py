"""One probe by its recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mobazoo.attention import MoBA
from mobazoo.checkpoint.ready import ready_model
from mobazoo.checkpoint.tokenizer import load_tokenizer
from mobazoo.config.probe import ProbeRecipe
from mobazoo.config.rules import LayerAttention
from mobazoo.errors import InputError
from mobazoo.eval.settings import setting
from mobazoo.eval.texts import read_texts
from mobazoo.explain import share_read
from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.probe.layers import FULL, suggest_rules
from mobazoo.probe.masses import LayerProbe
from mobazoo.results import write_result

Progress = Callable[[str, int, int], None]


def probe(recipe: ProbeRecipe, progress: Progress) -> dict[str, Any]:
    """Measures a checkpoint's full attention, and writes the result where the recipe says.

    Returns:
        ``probe``: ``texts``; ``grid``, a part for each setting with figures for each layer and head; ``signal``, a part
        for each block size; ``suggested`` where the recipe asks for it.

    Raises:
        InputError: a recipe, model or data that cannot be used.
    """
    recipe.check()
    texts = read_texts(recipe.data, load_tokenizer(recipe.model), recipe.length, recipe.documents, "probe")
    if recipe.suggest is not None and len(texts.names) < 4:
        raise InputError(
            f"probe.documents: want at least 4 documents of {recipe.length} tokens to rank layers on half of them and "
            f"check on the rest, data.path={recipe.data.path} has {len(texts.names)}; suggest=null measures without"
        )
    model = ready_model(recipe.model, device=recipe.device, dtype=recipe.dtype, progress=progress)
    limit = model.config.max_position_embeddings
    if recipe.length > limit:
        raise InputError(f"probe.length: want at most {limit}, the positions of {recipe.model}, got {recipe.length}")
    patterns = recipe.settings()
    layers = probe_layers(model, texts.ids, patterns, progress)
    dim = model.config.head_dim
    found: dict[str, Any] = {
        "texts": {"count": len(texts.names), "length": recipe.length},
        "grid": [_setting(pattern, layers, recipe.length) for pattern in patterns],
        "signal": [_signal(size, layers, dim) for size in layers[0].signal],
    }
    if recipe.suggest is not None:
        found["suggested"] = suggest_rules(model, texts.ids, recipe.suggest, recipe.batch, progress)
    if recipe.dest is not None:
        write_result(recipe.dest, "probe", recipe, {"probe": found})
    return {"probe": found}


@torch.no_grad()
def probe_layers(model: MobaForCausalLM, ids: Tensor, patterns: Sequence[MoBA], progress: Progress) -> list[LayerProbe]:
    """Every layer's figures over the texts ``[texts, length]``, text by text, the model with full attention."""
    probes = [LayerProbe(model.config.num_attention_heads, patterns) for _ in range(model.config.num_hidden_layers)]
    with setting(model, [FULL]), ExitStack() as hooks:
        for layer, one in zip(model.model.layers, probes, strict=True):
            hooks.enter_context(layer.self_attn.register_forward_pre_hook(partial(_look, one)))
        for number, text in enumerate(ids, 1):
            model.model(text[None].to(model.device), use_cache=False)
            progress("attention mass", number, len(ids))
    return probes


def _look(one: LayerProbe, attention: Any, given: tuple[Any, ...]) -> None:
    """A forward pre-hook of an ``Attention``: what the layer is about to read."""
    q, k, _ = attention.project(*given[:2])
    one.add(q[0], k[0], attention.head_dim**-0.5)


def _setting(pattern: MoBA, layers: Sequence[LayerProbe], length: int) -> dict[str, Any]:
    return {
        "block_size": pattern.block_size,
        "top_k": pattern.top_k,
        "share_read": float(share_read([LayerAttention(pattern)], length)),
        "layers": [_kept(layer, pattern) for layer in layers],
    }


def _kept(layer: LayerProbe, pattern: MoBA) -> dict[str, Any]:
    kept = layer.kept[pattern]
    heads = {name: (getattr(kept, name) / kept.queries).tolist() for name in ("mass", "best", "hit")}
    return {**heads, "density": sum(kept.density) / len(kept.density)}


def _signal(size: int, layers: Sequence[LayerProbe], head_dim: int) -> dict[str, Any]:
    return {
        "block_size": size,
        "layers": [
            {
                "gap": (layer.signal[size].gap / layer.signal[size].queries).tolist(),
                "snr": layer.signal[size].expected(head_dim, size).tolist(),
                "measured": layer.signal[size].measured().tolist(),
            }
            for layer in layers
        ],
    }
