"""What switching a layer costs, and which layers to leave full."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor

from mobazoo.config.probe import Suggest
from mobazoo.eval.loss import text_losses
from mobazoo.eval.settings import setting
from mobazoo.metrics import paired
from mobazoo.nn.causal_lm import MobaForCausalLM

Progress = Callable[[str, int, int], None]
Rules = list[dict[str, Any]]

FULL: dict[str, Any] = {"layers": ":", "pattern": "full", "backend": "auto"}


def rules_for(full: Collection[int], layers: int, suggest: Suggest) -> Rules:
    """The rule list that leaves the layers ``full`` full, ready for a recipe.

    Example:
        >>> rules_for({0, 2, 3}, 5, Suggest(64, 3))[1:]
        [{'layers': 0, 'pattern': 'full'}, {'layers': '2:4', 'pattern': 'full'}]
    """
    rules: Rules = [{"layers": ":", "pattern": "moba", "block_size": suggest.block_size, "top_k": suggest.top_k}]
    number = 0
    while number < layers:
        end = number
        while end < layers and end in full:
            end += 1
        if end > number:
            where: int | str = number if end == number + 1 else f"{number}:{end}"
            rules.append({"layers": where, "pattern": "full"})
        number = max(end, number + 1)
    return rules


def layer_losses(
    model: MobaForCausalLM, ids: Tensor, suggest: Suggest, batch: int, progress: Progress
) -> tuple[Tensor, list[Tensor]]:
    """Losses with full attention, and with each layer alone switched, ``[texts, length - 1]`` each."""
    layers = model.config.num_hidden_layers
    moba = {"pattern": "moba", "block_size": suggest.block_size, "top_k": suggest.top_k}

    def losses(name: str, rules: Rules) -> Tensor:
        with setting(model, [FULL, *rules]):
            return text_losses(model, ids, batch, partial(progress, name))

    base = losses("loss, full", [])
    return base, [losses(f"loss, layer {i} switched", [{"layers": i, **moba}]) for i in range(layers)]


def suggest_rules(
    model: MobaForCausalLM, ids: Tensor, suggest: Suggest, batch: int, progress: Progress
) -> dict[str, Any]:
    """Loss change by layer, the rules that leave the worst layers full, and how these do on texts not ranked by.

    Layers are ranked by the loss change on every second text; the other texts decide between the suggestion, the last
    layers (the papers' choice) and random choices of as many.

    Args:
        model: in eval mode.
        ids: ``[texts, length]``, at least four texts.
        suggest: the setting, and how many layers stay full.
        batch: texts at a time.
        progress: told what is done.
    """
    layers = model.config.num_hidden_layers
    base, switched = layer_losses(model, ids, suggest, batch, progress)
    ranking = [float((losses[::2].double() - base[::2]).mean()) for losses in switched]
    count = min(-(-layers // 4) if suggest.full is None else suggest.full, layers)
    worst = sorted(range(layers), key=lambda i: -ranking[i])[:count]
    found: dict[str, Any] = {
        "block_size": suggest.block_size,
        "top_k": suggest.top_k,
        "layers": [asdict(paired(losses, base)) for losses in switched],
        "full": sorted(worst),
        "rules": rules_for(worst, layers, suggest),
    }
    checked = _checked(model, ids[1::2], base[1::2], sorted(worst), suggest, batch, progress)
    return {**found, "checked": checked, "trust": trust(checked)}


def others(full: Sequence[int], layers: int, draws: int) -> list[list[int]]:
    """Other choices of as many layers, all of them where they are no more than ``draws``; the same every time."""
    if comb(layers, len(full)) - 1 <= draws:
        return [list(choice) for choice in combinations(range(layers), len(full)) if list(choice) != list(full)]
    found: list[list[int]] = []
    source = random.Random(0)
    while len(found) < draws:
        choice = sorted(source.sample(range(layers), len(full)))
        if choice not in (*found, list(full)):
            found.append(choice)
    return found


def _checked(
    model: MobaForCausalLM,
    ids: Tensor,
    base: Tensor,
    full: Sequence[int],
    suggest: Suggest,
    batch: int,
    progress: Progress,
) -> dict[str, Any]:
    layers = model.config.num_hidden_layers

    def losses(name: str, chosen: Sequence[int]) -> Tensor:
        with setting(model, [{**FULL}, *rules_for(chosen, layers, suggest)]):
            return text_losses(model, ids, batch, partial(progress, f"check, {name}"))

    ours = losses("suggested", full)
    last = losses("last layers", range(layers - len(full), layers))
    draws = others(full, layers, suggest.draws)
    drawn = [losses(f"choice {i + 1} of {len(draws)}", choice) for i, choice in enumerate(draws)]
    found: dict[str, Any] = {
        "texts": len(ids),
        "suggested": asdict(paired(ours, base)),
        "last": asdict(paired(last, base)),
        "others": [{"full": choice, **asdict(paired(some, base))} for choice, some in zip(draws, drawn, strict=True)],
    }
    if drawn:
        found["against_others"] = asdict(paired(ours, torch.stack(drawn).mean(0)))
    return found


def trust(checked: Mapping[str, Any]) -> dict[str, str]:
    """How far to believe a suggestion: ``high``, ``some``, ``low`` or ``none``, and why in a sentence.

    ``high``: better than the mean of the other choices by more than two standard errors and than three quarters of
    them. ``low``: not better by one standard error.
    """
    drawn = checked["others"]
    if not drawn:
        return {"level": "none", "why": "there is no other choice of as many layers to compare with"}
    said, ours = checked["against_others"], checked["suggested"]["mean"]
    beaten = sum(ours < other["mean"] for other in drawn)
    gain, error = -said["mean"], said["error"] or 0.0
    level = "high" if gain > 2 * error and 4 * beaten >= 3 * len(drawn) else "some" if gain > error else "low"
    why = (
        f"on {checked['texts']} texts it was not chosen by, it loses {gain:.4f} ± {error:.4f} nats less than the mean "
        f"of {len(drawn)} other choices of as many layers, and less than {beaten} of them"
    )
    return {"level": level, "why": why}
