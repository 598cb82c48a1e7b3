"""The gate on a CPU as one call of compiled code (gate.cpp), which torch's threads share.

A thread takes pieces: some thousand query rows of one key head. Centroids are laid out for products 512 at a time, and
the scores of a tile of queries with them stay in its cache until the few that may be among the best are picked out and
sorted. Memory for each thread, whatever the number of blocks: 512 centroids twice, a tile's scores (135 KiB) and room
for those picked out (68 KiB), a list of the piece's rows, and what rows know so far: a tile's, or where blocks
come in several parts up to 4 MiB. Other dtypes than float32 and bfloat16 are widened, 32 MiB of queries and one
key head's centroids at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import Structure, byref, c_int64, c_void_p

import torch
from torch import Tensor

from mobazoo.attention.heap import keep_heap
from mobazoo.attention.native.arguments import ARITHMETIC, Strides, point, sizes
from mobazoo.attention.native.build import library

# Bytes of a widened copy.
_WIDE = 32 << 20


class _Gate(Structure):
    """``Gate`` of gate.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "mean", "first", "stop", "index")),
        *((name, Strides) for name in ("q_at", "mean_at", "index_at", "first_at", "stop_at")),
        *((name, c_int64) for name in ("batch", "heads", "group", "tokens", "blocks", "dim", "reads", "index_bytes")),
        ("threads", c_int64),
    ]


def choose(q: Tensor, mean: Tensor, first: Tensor, stop: Tensor, index: Tensor) -> None:
    """Fills ``index`` with the best blocks of each query's ``first .. stop - 1``, best first.

    Who may read ``W`` blocks or fewer reads them all, the most recent first; empty slots are -1.

    Args:
        q: ``[B, Hq, T, D]``.
        mean: ``[B, Hkv, N, D]``, of the same dtype.
        first: ``[B, T]`` int32, never decreases along a row.
        stop: the same.
        index: ``[B, Hq, T, W]`` int16 or int32, places of a query together.

    Raises:
        MemoryError: no memory for what a thread holds.
    """
    if q.dtype in ARITHMETIC and mean.dtype == q.dtype:
        _run(q, mean, first, stop, index)
        return
    group = q.shape[1] // mean.shape[1]
    for row in range(q.shape[0]):
        for head in range(mean.shape[1]):
            at, keys = slice(head * group, (head + 1) * group), mean[row : row + 1, head : head + 1].float()
            for some in _ranges(q.shape[2], 4 * group * q.shape[3]):
                of = (slice(row, row + 1), at, some)
                _run(q[of].float(), keys, first[row : row + 1, some], stop[row : row + 1, some], index[of])


def _ranges(tokens: int, bytes_each: int) -> Iterator[slice]:
    step = max(1, _WIDE // bytes_each)
    return (slice(t, t + step) for t in range(0, tokens, step))


def _run(q: Tensor, mean: Tensor, first: Tensor, stop: Tensor, index: Tensor) -> None:
    if index.numel() == 0:
        return
    q, mean = (x if x.stride(3) == 1 else x.contiguous() for x in (q, mean))
    first, stop = first.int(), stop.int()
    gate = _Gate(
        **sizes(q, mean),
        blocks=mean.shape[2],
        reads=index.shape[3],
        index_bytes=index.element_size(),
        threads=torch.get_num_threads(),
    )
    point(gate, {"q": q, "mean": mean, "first": first, "stop": stop, "index": index})
    keep_heap()
    compiled = library()
    assert compiled is not None
    if compiled.moba_gate(byref(gate), ARITHMETIC[q.dtype]):
        raise MemoryError("route: no memory left for what a thread of the gate holds; use fewer threads")
