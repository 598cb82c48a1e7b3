"""How long a checkpoint takes to read a prompt, with full attention and with its own rules, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mobazoo.attention import MoBA
from mobazoo.bench.ratios import speedup
from mobazoo.checkpoint.ready import ready_model
from mobazoo.config.bench import BenchRecipe
from mobazoo.errors import InputError
from mobazoo.explain import share_read
from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.parts import Parts
from mobazoo.results import lasting, machine, write_result

FULL = ({"layers": ":", "pattern": "full", "backend": "auto"},)


def time_prefill(recipe: BenchRecipe, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Times the forward that fills the cache and gives the last token's logits.

    A round times full attention and then the rules; a ratio belongs to its round, so that a machine whose speed drifts
    favours neither. Prompts are random tokens. With ``dest`` every length is kept as soon as it is measured, and the
    same call goes on after an interruption.

    Returns:
        ``prefill``, for every length the seconds of each round, their medians and the median ratio.

    Raises:
        InputError: a recipe or model that cannot be used, or lengths of another recipe, machine or version kept beside
            ``dest``.
    """
    recipe.check()
    parts, rows = Parts(recipe.dest, recipe, recipe.model, lasting(machine())), []
    model = ready_model(recipe.model, attention=recipe.attention, device=recipe.device, dtype=recipe.dtype)
    limit = model.config.max_position_embeddings
    if max(recipe.lengths) > limit:
        raise InputError(
            f"bench.lengths: want at most {limit}, the positions of {recipe.model}, got {max(recipe.lengths)}"
        )
    if not any(isinstance(layer.pattern, MoBA) for layer in model.config.attention_layers()):
        raise InputError(
            f"bench.attention: no layer of {recipe.model} has MoBA, so there is nothing to compare; convert it, or "
            "give rules like attention='[{pattern: moba, block_size: 512, top_k: 3}]'"
        )
    each = recipe.rounds + 1

    def told(number: int, count: int) -> None:
        progress("prefill", number * each + count, len(recipe.lengths) * each)

    for number, length in enumerate(recipe.lengths):
        rows.append(parts.get(f"row {number}", partial(_row, model, length, recipe.rounds, partial(told, number))))
    found = {"prefill": rows}
    if recipe.dest is not None:
        write_result(recipe.dest, "bench", recipe, found)
        parts.done()
    return found


def _row(model: MobaForCausalLM, length: int, rounds: int, told: Callable[[int], None]) -> dict[str, Any]:
    own = [rule.as_dict() for rule in model.config.attention_rules()]
    ids = _prompt(length, model)
    full, moba = [], []
    for count in range(rounds + 1):  # the first one warms up
        full.append(_seconds(model, ids, [*own, *FULL]))
        moba.append(_seconds(model, ids, own))
        told(count + 1)
    share = float(share_read(model.config.attention_layers(), length))
    return {"length": length, "share_read": share, **summary(full[1:], moba[1:])}


def summary(full: Sequence[float], moba: Sequence[float]) -> dict[str, Any]:
    """Medians of paired seconds and of their ratios.

    Example:
        >>> summary([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])["speedup"]
        3.0
    """
    return {
        "full_s": list(full),
        "moba_s": list(moba),
        "full_median_s": median(full),
        "moba_median_s": median(moba),
        **speedup(full, moba),
    }


def _prompt(length: int, model: MobaForCausalLM) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)


@torch.no_grad()
def _seconds(model: MobaForCausalLM, ids: Tensor, rules: Sequence[Mapping[str, Any]]) -> float:
    model.set_attention(rules)
    begin = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1).logits.sum().item()  # .item() waits for the device
    return time.perf_counter() - begin
