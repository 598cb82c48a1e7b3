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
        """Those of ``x [B, H, T, D]``, or of ``[B, T]``."""
        return cls(*x.stride()[:3]) if x.dim() == 4 else cls(x.stride(0), 0, x.stride(1))


def sizes(q: Tensor, k: Tensor) -> dict[str, int]:
    """What both structs say of queries ``[B, Hq, T, D]`` and of keys or centroids ``[B, Hkv, N, D]``."""
    batch, heads, tokens, dim = q.shape
    return {"batch": batch, "heads": k.shape[1], "group": heads // k.shape[1], "tokens": tokens, "dim": dim}


def point(struct: Structure, tensors: dict[str, Tensor]) -> None:
    """Makes fields point to tensors of their names, and ``<name>_at`` say their strides where it is ``Strides``."""
    kinds = {name: kind for name, kind, *_ in struct._fields_}
    for name, x in tensors.items():
        setattr(struct, name, x.data_ptr())
        if kinds.get(f"{name}_at") is Strides:
            setattr(struct, f"{name}_at", Strides.of(x))
