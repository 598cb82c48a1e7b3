"""Loss on held-out rows, and how it falls along a document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import cross_entropy, pad

from mobazoo.data.collate import IGNORED, Collator
from mobazoo.data.rows import Rows
from mobazoo.data.tokens import Progress
from mobazoo.nn.causal_lm import MobaForCausalLM

PIECE = 256 << 20


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean losses in nats per token.

    Attributes:
        loss: over all tokens that are learned.
        trailing: over those in the last quarter of a row's length, where a document reaches that far.
        by_position: ``{"first-last": loss}`` over positions inside a document; ranges double in size.
        tokens: tokens measured.
    """

    loss: float
    trailing: float | None
    by_position: dict[str, float]
    tokens: int


@torch.no_grad()
def evaluate(
    model: MobaForCausalLM,
    rows: Rows,
    batch: int,
    device: torch.device,
    progress: Progress | None = None,
    rank: int = 0,
    world: int = 1,
) -> Losses:
    """Measures the loss on every row.

    Args:
        model: a zoo model; its mode is put back afterwards.
        rows: what to measure on.
        batch: rows in a forward.
        device: where the model is.
        progress: told ``("evaluate", rows done, rows)``.
        rank: number of this process.
        world: processes, which share the rows and all get the result.
    """
    training, sequence = model.training, model.model.sequence
    if sequence is not None:  # processes that share rows measure the same ones
        rank, world = rank // sequence.size, world // sequence.size
    model.eval()
    collate = Collator(rows.length)
    total = torch.zeros(rows.length, dtype=torch.float64)
    count = torch.zeros(rows.length, dtype=torch.float64)
    for start in range(0, len(rows), batch * world):
        own = range(start + rank, min(start + batch * world, len(rows)), world)
        # A process without a row left runs one all the same, because the others wait for it.
        chosen = [rows[i] for i in own] or [rows[0]]
        given: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate(chosen).items()}
        labels: Tensor = given.pop("labels")
        positions: Tensor = given.get("position_ids", torch.arange(rows.length, device=device).expand_as(labels))
        part = slice(None) if sequence is None else sequence.part(rows.length)
        after = pad(labels[:, 1:], (0, 1), value=IGNORED)[:, part].flatten()
        losses = _token_losses(model, given, after)
        kept = (after != IGNORED) & bool(own)
        at = pad(positions[:, 1:], (0, 1))[:, part].flatten()[kept].cpu()
        total.index_add_(0, at, losses[kept].double().cpu())
        count.index_add_(0, at, torch.ones_like(at, dtype=torch.float64))
        if progress is not None:
            progress("evaluate", min(start + batch * world, len(rows)), len(rows))
    model.train(training)
    if world > 1 or sequence is not None:
        sums = torch.stack([total, count]).to(device)
        distributed.all_reduce(sums)
        total, count = sums.cpu()
    return summary(total, count)


def _token_losses(model: MobaForCausalLM, given: dict[str, Any], after: Tensor) -> Tensor:
    """Loss of each token ``[B * T]`` float32; at most ``PIECE`` bytes of logits are in memory at a time."""
    kept: list[Tensor] = []
    # By a hook, because a sharded model gathers its weights where it is called itself; the head's stay until the next.
    hook = model.model.register_forward_hook(lambda module, args, output: kept.append(output.last_hidden_state))
    try:
        model(**given, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    some = max(1, PIECE // (4 * model.config.vocab_size))
    pieces = zip(kept[0].flatten(0, 1).split(some), after.split(some), strict=True)
    losses = [
        cross_entropy(model.lm_head(states).float(), wanted, ignore_index=IGNORED, reduction="none")
        for states, wanted in pieces
    ]
    return torch.cat(losses)


def summary(total: Tensor, count: Tensor) -> Losses:
    """Means from sums and counts by position, ``[length]`` float64 each."""
    length, by_position = len(total), {}
    first, last = 0, 64
    while first < length:
        end = min(last, length)
        if count[first:end].sum():
            by_position[f"{first}-{end - 1}"] = float(total[first:end].sum() / count[first:end].sum())
        first, last = last, 2 * last
    tail = slice(length - length // 4, length)
    trailing = float(total[tail].sum() / count[tail].sum()) if count[tail].sum() else None
    return Losses(float(total.sum() / count.sum().clamp(min=1)), trailing, by_position, int(count.sum()))
