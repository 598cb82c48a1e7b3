"""float64 oracles of what MoBA computes, written from the definition and not from the library.

A row of slots is described by signed lengths: ``(-3, 20, 1)`` is three slots of padding, a document of 20 tokens and
one of 1 token. ``Chosen`` holds, for each row, head and query, the first slots of the earlier blocks it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Rows = Sequence[Sequence[int]]
Chosen = list[list[list[set[int]]]]  # [B][Hq][T]


def layout(row: Sequence[int]) -> list[tuple[int, int] | None]:
    """``(document, position)`` of every slot of a row, None at padding."""
    slots: list[tuple[int, int] | None] = []
    documents = 0
    for length in row:
        if length < 0:
            slots += [None] * -length
        elif length:
            slots += [(documents, position) for position in range(length)]
            documents += 1
    return slots


def candidates(slots: Sequence[tuple[int, int] | None], slot: int, block_size: int) -> range:
    """First slots of the blocks the gate may choose for the query at ``slot``: all before its own, same document."""
    here = slots[slot]
    if here is None:
        return range(0)
    _, position = here
    return range(slot - position, slot - position % block_size, block_size)


def read_mask(rows: Rows, heads: int, queries: int, q_start: int, block_size: int | None, chosen: Chosen) -> Tensor:
    """The keys each query reads: bool ``[B, heads, T, S]``; ``block_size`` None is full causal attention."""
    slots = [layout(row) for row in rows]
    mask = torch.zeros(len(rows), heads, queries, len(slots[0]), dtype=torch.bool)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, mask.shape[:3])).tolist() if mask.numel() else ():
        slot = q_start + t
        here = slots[b][slot]
        if here is None:
            continue
        own = slot - (here[1] if block_size is None else here[1] % block_size)
        mask[b, h, t, own : slot + 1] = True
        for start in chosen[b][h][t] if block_size is not None else ():
            mask[b, h, t, start : start + block_size] = True
    return mask


@dataclass(frozen=True)
class Attention:
    """float64 attention over a mask, its gradients, and the magnitudes that a rounding error is relative to.

    A magnitude is the same sum with every term's absolute value: rounding each term of a sum once in a format of
    unit roundoff ``u`` moves the sum by at most ``u`` times its magnitude.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    scale: float
    dout: Tensor

    @cached_property
    def _inputs(self) -> list[Tensor]:
        return [x.detach().double().requires_grad_() for x in (self.q, self.k, self.v)]

    @cached_property
    def _scores(self) -> Tensor:
        q, k, _ = self._inputs
        return q @ self._repeated(k).mT * self.scale

    @cached_property
    def score_magnitude(self) -> float:
        """Largest magnitude of a score that is read: ``scale * |q| . |k|``."""
        q, k, _ = (x.detach().abs() for x in self._inputs)
        magnitude = q @ self._repeated(k).mT * abs(self.scale)
        return float(torch.where(self.mask, magnitude, 0.0).max()) if self.mask.numel() else 0.0

    @cached_property
    def _weights(self) -> Tensor:
        weights = self._scores.masked_fill(~self.mask, float("-inf")).softmax(-1)
        return torch.where(self.mask.any(-1, keepdim=True), weights, 0.0)

    def _repeated(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.q.shape[1] // self.k.shape[1], dim=1)

    def _summed(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.k.shape[1], -1)).sum(2)

    @cached_property
    def out(self) -> Tensor:
        return self._weights @ self._repeated(self._inputs[2])

    @cached_property
    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.autograd.grad(self.out, self._inputs, self.dout.double(), retain_graph=True)
        return dq, dk, dv

    @cached_property
    def magnitudes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of out, dq, dk and dv."""
        q, k, v = (x.detach().abs() for x in self._inputs)
        weights, dout = self._weights.detach(), self.dout.double().abs()
        out = weights @ self._repeated(v)
        dweights = dout @ self._repeated(v).mT
        dscores = weights * (dweights + (dout * out).sum(-1, keepdim=True)) * self.scale
        return out, dscores @ self._repeated(k), self._summed(dscores.mT @ q), self._summed(weights.mT @ dout)

    def settled(self) -> Attention:
        """This, with all results and without the matrices they came from, which many cases together would keep."""
        results = {name: getattr(self, name) for name in ("score_magnitude", "gradients", "magnitudes")}
        vars(self).update(results, out=self.out.detach())
        for name in ("_inputs", "_scores", "_weights"):
            del vars(self)[name]
        return self


@dataclass(frozen=True)
class GateAnswer:
    """The blocks the definition chooses for one query, and whether float32 arithmetic must choose the same."""

    chosen: set[int]
    decided: bool


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def gamma(n: int) -> float:
    """Relative error bound of ``n`` float32 roundings in a row (Higham, Accuracy and Stability, lemma 3.1)."""
    u = unit_roundoff(torch.float32)
    return n * u / (1 - n * u)


def centroid(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of a block's keys ``[block_size, D]`` as a float64 value in the keys' dtype, and its uncertainty.

    A float32 sum in any order is within ``gamma(block_size)`` of the sum of absolute values, and it is exact where
    all terms are multiples of one quantum and their absolute sum is below 2**24 of it, as with most 16-bit keys:
    then the mean is the correctly rounded quotient. What rounds to one number over that whole interval is certain;
    elsewhere two neighbours of the keys' dtype are both right.
    """
    wide = keys.double()
    if keys.dtype == torch.float64:
        return wide.mean(0), wide.abs().mean(0) * len(keys) * torch.finfo(torch.float64).eps
    exponent = torch.where(wide == 0, 1024, torch.frexp(wide).exponent).amin(0)
    quantum = torch.finfo(keys.dtype).eps * torch.exp2(exponent.double() - 1)
    exact = wide.abs().sum(0) <= 2**24 * quantum
    mean = torch.where(exact, wide.mean(0).float().double(), wide.mean(0))
    error = torch.where(exact, 0.0, gamma(len(keys) + 1) * wide.abs().mean(0))
    low, high = ((mean + e).to(keys.dtype).double() for e in (-error, error))
    return (low + high) / 2, (high - low) / 2


def gate(q: Tensor, k: Tensor, rows: Rows, block_size: int, top_k: int, q_start: int) -> list[list[list[GateAnswer]]]:
    """The definition's choice for ``q`` ``[B, Hq, T, D]`` and ``k`` ``[B, Hkv, S, D]``, indexed ``[B][Hq][T]``.

    The computed float32 score of a block lies within ``gamma_D |q| . |c| + |q| . uncertainty(c)`` of the float64 one
    (two more roundings where float64 inputs are first rounded to float32). A choice is decided when no block left
    out can reach one taken within these bounds. Exactly equal scores go to the most recent block.
    """
    group = q.shape[1] // k.shape[1]
    roundings = q.shape[3] + (2 if q.dtype == torch.float64 else 0)
    answers = []
    for b, row in enumerate(rows):
        slots = layout(row)
        starts = sorted({s for slot in range(len(slots)) for s in candidates(slots, slot, block_size)})
        column = {s: n for n, s in enumerate(starts)}
        of_row = []
        for h in range(q.shape[1]):
            blocks = [centroid(k[b, h // group, s : s + block_size]) for s in starts]
            query = q[b, h].double()
            if blocks:
                mean, doubt = (torch.stack(x) for x in zip(*blocks, strict=True))
                score = (query @ mean.T).tolist()
                bound = (query.abs() @ (gamma(roundings) * (mean.abs() + doubt) + doubt).T).tolist()
            of_head = []
            for t in range(q.shape[2]):
                allowed = candidates(slots, q_start + t, block_size)
                ranked = sorted(allowed, key=lambda s: (score[t][column[s]], s), reverse=True)
                taken, left = ranked[: top_k - 1], ranked[top_k - 1 :]
                worst = min((score[t][column[s]] - bound[t][column[s]] for s in taken), default=float("inf"))
                best = max((score[t][column[s]] + bound[t][column[s]] for s in left), default=float("-inf"))
                of_head.append(GateAnswer(set(taken), worst > best))
            of_row.append(of_head)
        answers.append(of_row)
    return answers
