"""Key convolution (arXiv 2511.11571, appendix C): the only part of MoBA here that adds weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from mobazoo.errors import UnsupportedError


class KeyConv(nn.Module):
    """Depthwise causal convolution on keys along a document, ``k'_t = k_t + SiLU(sum_{l<W} w_l k_{t-l})``.

    Zero-initialised, so that adding it to a checkpoint changes nothing. It restarts at each document: taps before its
    first token are zero.

    Args:
        heads: key heads.
        head_dim: ``D``; every channel of every head has its own taps.
        width: ``W``.
    """

    def __init__(self, heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, heads, 1, head_dim))

    def forward(self, k: Tensor, pos: Tensor, before: Tensor | None = None) -> Tensor:
        """Keys ``[B, Hkv, T, D]`` and their positions in their documents ``[B, T]`` to keys of the same shape.

        ``before`` ``[B, Hkv, width - 1, D]`` are the keys of the slots before them (None: there are none).

        Raises:
            UnsupportedError: the heads are split over processes, and these weights are not.
        """
        if k.shape[1] != self.weight.shape[1]:
            raise UnsupportedError(
                f"kconv: its weights are not split over processes (tensor parallelism), and here are {k.shape[1]} of "
                f"{self.weight.shape[1]} key heads; share rows instead (train.sequence), or load without tp_plan"
            )
        mixed, width, length = self.weight[0] * k, self.weight.shape[0], k.shape[2]
        known = pad(k, (0, 0, width - 1, 0)) if before is None else torch.cat([before, k], dim=2)
        for lag in range(1, width):
            earlier = known[:, :, width - 1 - lag : width - 1 - lag + length]
            mixed = mixed + self.weight[lag] * torch.where((pos >= lag)[:, None, :, None], earlier, 0.0)
        return k + silu(mixed)
