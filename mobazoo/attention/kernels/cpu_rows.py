"""Rows scattered through memory, on a CPU: compiled loops that ask for them ahead, or torch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

from mobazoo.attention.native import library


def gather(source: Tensor, rows: Tensor, spare: int = 0) -> Tensor:
    """``source[rows]`` and then ``spare`` rows of zeros, ``[n + spare, D]``; ``source [R, D]`` is contiguous."""
    count, dim = rows.shape[0], source.shape[1]
    found = source.new_empty(count + spare, dim)
    if spare:
        found[count:] = 0
    compiled = library()
    if compiled is None:
        torch.index_select(source, 0, rows, out=found[:count])
    else:
        pointers, row_bytes = (source.data_ptr(), rows.data_ptr()), dim * source.element_size()
        compiled.moba_gather(*pointers, count, row_bytes, found.data_ptr(), torch.get_num_threads())
    return found


def fold(out: Tensor, lse: Tensor, rows: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges partial softmaxes over other keys, ``part [n, D]`` with its log-sum-exp, into ``rows`` of what is there.

    ``out [R, D]`` and ``lse [R]`` are changed. All are contiguous and of one dtype, float32 or wider; a row comes once.
    """
    compiled = library() if out.dtype == torch.float32 else None
    if compiled is None:
        # The weight of the second softmax is a sigmoid of the gap of their log-sum-exps.
        old, old_lse = out.index_select(0, rows), lse.index_select(0, rows)
        old.lerp_(part, (part_lse - old_lse).sigmoid_()[:, None])
        out.index_copy_(0, rows, old)
        lse.index_copy_(0, rows, torch.logaddexp(old_lse, part_lse))
    else:
        pointers, parts = (out.data_ptr(), lse.data_ptr(), rows.data_ptr()), (part.data_ptr(), part_lse.data_ptr())
        compiled.moba_fold(*pointers, rows.shape[0], out.shape[1], *parts, torch.get_num_threads())


def add(sums: Tensor, rows: Tensor, part: Tensor, scale: float = 1.0) -> None:
    """``sums[rows] += scale * part``: ``sums [R, D]`` float32 or wider and contiguous, ``part [n, D]``."""
    compiled = library() if sums.dtype == torch.float32 else None
    if compiled is None:
        sums.index_add_(0, rows, part.to(sums.dtype), alpha=scale)
        return
    narrow = part.dtype == torch.bfloat16
    part = (part if narrow else part.float()).contiguous()
    loop = compiled.moba_add_bfloat16 if narrow else compiled.moba_add
    loop(sums.data_ptr(), rows.data_ptr(), *part.shape, part.data_ptr(), scale)
