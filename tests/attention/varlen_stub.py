"""A varlen provider that computes the real thing in PyTorch, and leaves NaN wherever a kernel may leave anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from mobazoo.attention.kernels.sequences import Sequences


@dataclass
class Stub:
    """Checks what every kernel asks of its runs; ``calls`` keeps what it was given."""

    calls: list[tuple[Tensor, Tensor, Sequences]] = field(default_factory=list)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, runs: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        self.calls.append((q, k, runs))
        out = torch.full_like(q, torch.nan)
        lse = torch.full((q.shape[1], q.shape[0]), torch.nan, dtype=torch.promote_types(q.dtype, torch.float32))
        for of_q, of_k in _runs(q, k, runs):
            scores = _scores(q[of_q], k[of_k], runs.causal, scale)  # [H, q, k]
            values = _grouped(v[of_k], q.shape[1])
            out[of_q] = (scores.softmax(-1) @ values).transpose(0, 1).to(out.dtype)
            lse[:, of_q] = scores.logsumexp(-1)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Sequences, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append((q, k, runs))
        assert lse.shape == (q.shape[1], q.shape[0])
        dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
        for of_q, of_k in _runs(q, k, runs):
            keys, values = (_grouped(x[of_k], q.shape[1]) for x in (k, v))
            grad, result, queries = (x[of_q].transpose(0, 1).to(lse.dtype) for x in (dout, out, q))
            weight = (_scores(q[of_q], k[of_k], runs.causal, scale) - lse[:, of_q, None]).exp()
            change = weight * (grad @ values.mT - (grad * result).sum(-1, keepdim=True)) * scale
            dq[of_q] = (change @ keys).transpose(0, 1).to(dq.dtype)
            dk[of_k] = _summed(change.mT @ queries, k.shape[1]).to(dk.dtype)
            dv[of_k] = _summed(weight.mT @ grad, k.shape[1]).to(dv.dtype)
        return dq, dk, dv


def _runs(q: Tensor, k: Tensor, runs: Sequences) -> Iterator[tuple[slice, slice]]:
    cu_q, cu_k = runs.cu_q.tolist(), runs.cu_k.tolist()
    assert runs.cu_q.dtype == runs.cu_k.dtype == torch.int32
    assert len(cu_q) == len(cu_k) >= 2
    assert 0 <= cu_q[0] <= cu_q[-1] <= q.shape[0]
    assert 0 <= cu_k[0] <= cu_k[-1] <= k.shape[0]
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        assert q0 <= q1
        assert k0 <= k1
        if q0 < q1 and k0 < k1:
            assert q1 - q0 <= runs.max_q
            assert k1 - k0 <= runs.max_k
            assert q1 - q0 <= k1 - k0 or not runs.causal
            yield slice(q0, q1), slice(k0, k1)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """``[k, Hkv, D]`` as ``[H, k, D]``, as wide as a log-sum-exp."""
    wide = x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))
    return wide.repeat_interleave(heads // x.shape[1], dim=0)


def _summed(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(0, (heads, -1)).sum(1).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    keys = _grouped(k, q.shape[1])
    scores = q.transpose(0, 1).to(keys.dtype) @ keys.mT * scale
    if causal:
        hidden = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores
