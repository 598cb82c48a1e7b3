"""``Fitted``: makes any call one that FlashAttention-2 kernels take. Each rule was read in the kernels' sources."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from mobazoo.attention.kernels.sequences import Sequences

_ALIGNED = 8  # elements: kernels load 16 bytes at a time, and ask for head dims that are a multiple of this
_MOST_RUNS = 65535  # runs are the y dimension of the launch grid


class Provider(Protocol):
    """A varlen attention kernel.

    ``q``, ``out``, ``dout`` and ``dq`` are ``[Q, H, D]``, ``k`` and ``v`` ``[K, Hkv, D]`` with ``H`` a multiple of
    ``Hkv``, the log-sum-exp is ``[H, Q]`` float32. Cumulated lengths need not start at 0. Undefined, NaN included: rows
    of queries in no run or in a run without keys, and gradients of keys in no run or in a run without queries.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, runs: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Sequences, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v; ``out`` and ``lse`` may be of a softmax over more keys than these."""


class Fitted:
    """A provider that pads head dims, aligns memory, and splits calls of too many runs, around one that does not.

    Args:
        inner: the kernel.
        most_runs: runs that it takes in one call.
    """

    def __init__(self, inner: Provider, most_runs: int = _MOST_RUNS) -> None:
        self.inner = inner
        self.most_runs = most_runs

    def forward(self, q: Tensor, k: Tensor, v: Tensor, runs: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        """See ``Provider``."""
        dim = q.shape[2]
        q, k, v = (_aligned(x) for x in (q, k, v))
        first, *others = self._calls(runs)
        out, lse = self.inner.forward(q, k, v, first, scale)
        for some in others:
            inside = _inside(some.cu_q, q.shape[0])
            part, part_lse = self.inner.forward(q, k, v, some, scale)
            out, lse = torch.where(inside[:, None, None], part, out), torch.where(inside, part_lse, lse)
        return out[..., :dim], lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Sequences, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Provider``."""
        dim = q.shape[2]
        dout, q, k, v, out = (_aligned(x) for x in (dout, q, k, v, out))
        lse = lse.contiguous()
        first, *others = self._calls(runs)
        dq, dk, dv = self.inner.backward(dout, q, k, v, out, lse, first, scale)
        for some in others:
            of_q = _inside(some.cu_q, q.shape[0])[:, None, None]
            of_k = _inside(some.cu_k, k.shape[0])[:, None, None]
            part_dq, part_dk, part_dv = self.inner.backward(dout, q, k, v, out, lse, some, scale)
            dq, dk, dv = (
                torch.where(of_q, part_dq, dq),
                torch.where(of_k, part_dk, dk),
                torch.where(of_k, part_dv, dv),
            )
        return dq[..., :dim], dk[..., :dim], dv[..., :dim]

    def _calls(self, runs: Sequences) -> list[Sequences]:
        # With max_q 1 and grouped heads the kernel takes every run for one query, and fails where some have none.
        runs = runs._replace(max_q=max(2, runs.max_q))
        return [
            runs._replace(cu_q=runs.cu_q[i : i + self.most_runs + 1], cu_k=runs.cu_k[i : i + self.most_runs + 1])
            for i in range(0, runs.cu_q.shape[0] - 1, self.most_runs)
        ]


def _inside(cu: Tensor, length: int) -> Tensor:
    token = torch.arange(length, device=cu.device)
    return (token >= cu[0]) & (token < cu[-1])


def _aligned(x: Tensor) -> Tensor:
    """``[tokens, heads, D]`` with ``D`` padded with zeros and every row aligned; a copy only where it is not."""
    extra = -x.shape[2] % _ALIGNED
    if extra:
        return pad(x, (0, extra))
    strides_fit = x.stride(2) == 1 and x.stride(0) % _ALIGNED == 0 and x.stride(1) % _ALIGNED == 0
    return x if strides_fit and x.storage_offset() % _ALIGNED == 0 else x.contiguous()
