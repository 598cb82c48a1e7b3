"""The loss of a language-model head without its logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from mobazoo.nn.sequence import RowShare

IGNORED = -100
_BYTES = 256 << 20  # of float32 logits at a time


class _HeadLoss(torch.autograd.Function):
    """Sum of cross-entropies over ``items``. Gradients are made in the forward, chunk by chunk, from its logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, items: Tensor, train: bool) -> Tensor:
        tokens, vocab = hidden.shape[0], weight.shape[0]
        chunk = max(1, min(tokens, _BYTES // (4 * vocab)))
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=exact)
        grad_hidden = torch.empty_like(hidden) if train else None
        # Summed over chunks in float32: in bfloat16 small parts would be lost.
        grad_weight = torch.zeros_like(weight, dtype=exact) if train else None
        for part in _slices(tokens, chunk):
            logits = linear(hidden[part], weight).to(exact)
            kept = labels[part] != IGNORED
            at = labels[part].clamp(min=0)[:, None]
            norm = logits.logsumexp(1, keepdim=True)
            total += ((norm - logits.gather(1, at))[:, 0] * kept).sum()
            if grad_hidden is not None and grad_weight is not None:
                grad = logits.sub_(norm).exp_()
                grad.scatter_add_(1, at, torch.full_like(norm, -1.0))
                grad = (grad * (kept[:, None].to(exact) / items)).to(
                    weight.dtype
                )  # scaled here, lest it be rounded twice
                grad_hidden[part] = grad @ weight
                grad_weight += grad.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total / items

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight = ctx.saved_tensors
        return (hidden * grad).to(hidden.dtype), (weight * grad).to(ctx.dtype), None, None, None


def _slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    items: Tensor | int | None = None,
    sequence: RowShare | None = None,
) -> Tensor:
    """Mean cross-entropy of the next token; at most 256 MiB of logits are in memory at a time.

    Args:
        hidden: ``[B, T, hidden]`` states that the head reads, of this process's part where rows are shared.
        weight: ``[vocab, hidden]`` of the head.
        labels: ``[B, T]`` of whole rows, shifted by one inside, -100 ignored.
        items: divide the sum by this instead of by the labels that count.
        sequence: this process's part of the rows. The mean of the results over the processes is then the loss.

    Returns:
        scalar in float32, or float64 for float64.
    """
    count = (labels[:, 1:] != IGNORED).sum() if items is None else torch.as_tensor(items, device=hidden.device)
    if sequence is None:
        states, after = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    else:
        states, after = hidden.flatten(0, 1), pad(labels[:, 1:], (0, 1), value=IGNORED)
        after = after[:, sequence.part(labels.shape[1])].flatten()
        count = count / sequence.size
    train = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    kind = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    with torch.autocast(hidden.device.type, enabled=False):
        if kind is not None:
            states, weight = states.to(kind), weight.to(kind)
        loss: Tensor = _HeadLoss.apply(states, weight, after, count, train)
    return loss
