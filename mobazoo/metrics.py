"""Loss by position and what is made of it, each with its standard error over texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mobazoo.errors import InputError

# Logits in memory at a time, in bytes of float32.
_LOGITS = 64 << 20


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over texts, and its standard error (None where there is one text only)."""

    mean: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Bucket:
    """Loss over the positions ``first .. last``, both included; position ``t`` is predicted from ``t`` tokens."""

    first: int
    last: int
    loss: Estimate


def token_losses(hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Cross-entropy of every token given those before it, without all logits in memory at once.

    Args:
        hidden: ``[B, T, hidden]`` final states.
        labels: ``[B, T]`` int64, the tokens themselves.
        head: states to logits.

    Returns:
        ``[B, T - 1]`` float32, in nats; column ``t`` is the loss of token ``t + 1``.
    """
    states, wanted = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    width = head(states[:1]).shape[-1]
    step = max(1, _LOGITS // (4 * width))
    losses = [
        cross_entropy(head(states[at : at + step]).float(), wanted[at : at + step], reduction="none")
        for at in range(0, len(states), step)
    ]
    return torch.cat(losses).view(labels.shape[0], -1)


def estimate(values: Tensor) -> Estimate:
    """Mean and standard error of ``[texts]`` values, in float64.

    Example:
        >>> estimate(torch.tensor([1.0, 2.0, 3.0]))
        Estimate(mean=2.0, error=0.5773502691896258)
    """
    values = values.double()
    error = None if len(values) < 2 else float(values.std()) / len(values) ** 0.5
    return Estimate(float(values.mean()), error)


def mean_loss(losses: Tensor) -> Estimate:
    """Over all positions of ``[texts, T - 1]``; texts are what varies."""
    return estimate(losses.double().mean(1))


def trailing_loss(losses: Tensor, tokens: int) -> Estimate:
    """Over the last ``tokens`` positions (arXiv 2502.13189, section 3.1: what a long context is for).

    Raises:
        InputError: more positions than there are.
    """
    if not 1 <= tokens <= losses.shape[1]:
        raise InputError(f"trailing: want 1 to {losses.shape[1]}, the predicted tokens of a text, got {tokens}")
    return mean_loss(losses[:, -tokens:])


def by_position(losses: Tensor, buckets: int) -> list[Bucket]:
    """Loss by position in ``buckets`` runs of positions, equal to within one position.

    Raises:
        InputError: more buckets than positions.
    """
    length = losses.shape[1]
    if not 1 <= buckets <= length:
        raise InputError(f"buckets: want 1 to {length}, the predicted tokens of a text, got {buckets}")
    edges = [i * length // buckets for i in range(buckets + 1)]
    return [Bucket(first + 1, last, mean_loss(losses[:, first:last])) for first, last in pairwise(edges)]


def paired(losses: Tensor, against: Tensor) -> Estimate:
    """Mean loss minus that of ``against`` on the same texts; the error is that of the differences.

    Raises:
        InputError: other texts.
    """
    if losses.shape != against.shape:
        raise InputError(f"paired: want the same texts, got {list(losses.shape)} and {list(against.shape)}")
    return mean_loss(losses.double() - against.double())
