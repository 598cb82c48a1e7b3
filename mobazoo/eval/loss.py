"""Loss by position under several settings, on the same texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mobazoo.config.eval import LossTask
from mobazoo.eval.settings import setting
from mobazoo.explain import share_read
from mobazoo.metrics import by_position, mean_loss, paired, token_losses, trailing_loss
from mobazoo.nn.causal_lm import MobaForCausalLM

Progress = Callable[[str, int, int], None]


def measure_loss(
    model: MobaForCausalLM,
    ids: Tensor,
    settings: Mapping[str, Sequence[Mapping[str, Any]]],
    task: LossTask,
    batch: int,
    progress: Progress,
) -> dict[str, Any]:
    """Loss of every setting, in nats, and its difference to the first setting, text by text.

    Args:
        model: in eval mode.
        ids: ``[texts, length]``.
        settings: rules by name, applied after the model's own.
        task: what to report.
        batch: texts at a time.
        progress: told ``("loss, <setting>", texts done, texts)``.
    """
    found: dict[str, Any] = {}
    first = None
    for name, rules in settings.items():
        with setting(model, rules):
            losses = text_losses(model, ids, batch, partial(progress, f"loss, {name}"))
            share = float(share_read(model.config.attention_layers(), ids.shape[1]))
        first = losses if first is None else first
        found[name] = {
            "share_read": share,
            "mean": asdict(mean_loss(losses)),
            "trailing": asdict(trailing_loss(losses, task.trailing)),
            "difference": asdict(paired(losses, first)),
            "trailing_difference": asdict(paired(losses[:, -task.trailing :], first[:, -task.trailing :])),
            "by_position": [asdict(bucket) for bucket in by_position(losses, task.buckets)],
        }
    return {"trailing_tokens": task.trailing, "settings": found}


@torch.no_grad()
def text_losses(model: MobaForCausalLM, ids: Tensor, batch: int, done: Callable[[int, int], None]) -> Tensor:
    """Losses of the tokens of ``[texts, length]``: ``[texts, length - 1]`` float32 on the host; ``batch`` at a time."""
    parts = []
    for at in range(0, len(ids), batch):
        some = ids[at : at + batch].to(model.device)
        hidden = model.model(some, use_cache=False).last_hidden_state
        parts.append(token_losses(hidden, some, model.lm_head).cpu())
        done(min(at + batch, len(ids)), len(ids))
    return torch.cat(parts)
