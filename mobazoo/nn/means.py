"""The one reduction that makes a cached block's centroid."""

from __future__ import annotations

import torch
from torch import Tensor


def block_means(blocks: Tensor) -> Tensor:
    """Mean key of each block ``[..., block_size, D]``, in float32 and rounded once to the keys' dtype: ``[..., D]``.

    Halves are added to halves, element by element. So the result does not depend on how many blocks are reduced
    together, on threads or on the device, as a library's reduction may: however a prompt is split, its centroids agree
    bit for bit.
    """
    wide = torch.promote_types(blocks.dtype, torch.float32)
    length = blocks.shape[-2]
    total = blocks
    while total.shape[-2] > 1:
        half = total.shape[-2] // 2
        folded = total[..., :half, :].to(wide) + total[..., half : 2 * half, :].to(wide)
        if total.shape[-2] % 2:
            folded = torch.cat([folded[..., :1, :] + total[..., -1:, :].to(wide), folded[..., 1:, :]], dim=-2)
        total = folded
    return (total.squeeze(-2).to(wide) / length).to(blocks.dtype)
