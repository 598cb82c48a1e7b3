"""What compiled functions of tensors are handed, beside pointers to them."""

from __future__ import annotations

from ctypes import Structure, c_int64

import torch
from torch import Tensor

# What multiplies: float32, or bfloat16 as the processor does it best. Tests ask for the others.
FLOAT32, BFLOAT16, BFLOAT16_BY_VECTORS, BFLOAT16_BY_FLOAT32 = range(4)
ARITHMETIC = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


class Strides(Structure):
    """``Strides`` of attention.h: from row to row, head to head and token to token."""

    _fields_ = [(name, c_int64) for name in ("row", "head", "token")]

    @classmethod
    def of(cls, x: Tensor) -> Strides:
        """Those of ``x [B, H, T, D]``."""
        return cls(*x.stride()[:3])
