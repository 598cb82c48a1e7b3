"""Which blocks the queries of one text read, head by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mobazoo.attention import MoBA, Routes, centroids, route
from mobazoo.config.eval import ChoicesTask
from mobazoo.errors import InputError
from mobazoo.eval.settings import setting
from mobazoo.nn.causal_lm import MobaForCausalLM


def block_choices(
    model: MobaForCausalLM, ids: Tensor, rules: Sequence[Mapping[str, Any]], task: ChoicesTask
) -> dict[str, Any]:
    """The block numbers that every query chooses besides its own block.

    Args:
        model: in eval mode.
        ids: ``[length]``, one text.
        rules: applied after the model's own.
        task: which layers and heads.

    Returns:
        ``layers``, a list of ``{layer, block_size, heads}``; ``heads`` maps a head to a list with a list for every
        query, best block first.

    Raises:
        InputError: a layer or head that is not there, or a layer with full attention.
    """
    heads = _numbers(task.heads, model.config.num_attention_heads, "eval.choices.heads")
    layers = _numbers(task.layers, model.config.num_hidden_layers, "eval.choices.layers")
    with setting(model, rules):
        routes = _routes(model, ids, layers)
    return {
        "layers": [
            {
                "layer": layer,
                "block_size": routes[layer].block_size,
                "heads": {str(head): _chosen(routes[layer].index[0, head]) for head in heads},
            }
            for layer in layers
        ]
    }


@torch.no_grad()
def _routes(model: MobaForCausalLM, ids: Tensor, layers: Sequence[int]) -> dict[int, Routes]:
    found: dict[int, Routes] = {}
    with ExitStack() as hooks:
        for layer in layers:
            attention = model.model.layers[layer].self_attn
            if not isinstance(attention.layer.pattern, MoBA):
                raise InputError(f"eval.choices.layers: layer {layer} has full attention in this setting; name another")
            hooks.enter_context(attention.register_forward_pre_hook(partial(_keep, found)))
        model.model(ids[None].to(model.device), use_cache=False)
    return found


def _keep(found: dict[int, Routes], attention: Any, given: tuple[Any, ...]) -> None:
    """A forward pre-hook of an ``Attention``: the gate's answer for what the layer is about to compute."""
    x, geometry = given[:2]
    pattern, (q, k, _) = attention.layer.pattern, attention.project(x, geometry)
    known = centroids(k, pattern.block_size, geometry.segments)
    found[attention.number] = route(q, known, pattern, geometry.segments, geometry.q_start)


def _chosen(index: Tensor) -> list[list[int]]:
    return [[block for block in blocks if block >= 0] for blocks in index.tolist()]


def _numbers(said: Sequence[int], count: int, where: str) -> list[int]:
    for number in said:
        if not -count <= number < count:
            raise InputError(f"{where}: {number} is not there; the model has {count}")
    return [number % count for number in said] or list(range(count))
