"""The flash schedule on a CPU as one call of compiled code (``attention/native``), which torch's threads share.

A thread takes pieces: some thousand query rows of one key head. What they know so far, the softmax of the keys that
they have read, stays in its cache. Keys are laid out for products 512 at a time, in order of blocks, and whoever reads
them is gathered, goes on with its softmax, and is put back. The backward walks the same work with the merged output
and log-sum-exp. Memory beyond the result, for each thread: a piece's rows (``MOST`` in attention.cpp), 512 keys and
values laid out. In the backward gradients of keys and values are summed in float32: in the result itself, in bfloat16
in a copy of one key head's for each thread, and where key heads are fewer than threads in up to four copies of all.
"""

from __future__ import annotations

from ctypes import Structure, byref, c_double, c_int64, c_void_p

import torch
from torch import Tensor

from mobazoo.attention.heap import keep_heap
from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.native import library
from mobazoo.attention.native.arguments import ARITHMETIC, Strides, point, sizes

# Threads that share a key head in the backward, each with sums of its own for its gradients.
_MOST_SUMS = 4

# Stages of a pass, as clock.h has them.
STAGES = ("own blocks", "sort", "lay out keys", "gather", "routed kernel", "merge", "the rest")


class _Batch(Structure):
    """``Batch`` of attention.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "dout", "out", "dq", "lse", "dk", "dv")),
        *((name, c_void_p) for name in ("doc", "pos", "index", "start", "spent")),
        *((name, Strides) for name in ("q_at", "k_at", "v_at", "dout_at")),
        *((name, c_int64) for name in ("doc_at", "pos_at", "start_at")),
        *((name, c_int64) for name in ("batch", "heads", "group", "tokens", "slots", "dim", "first", "block_size")),
        *((name, c_int64) for name in ("blocks", "reads", "index_bytes", "parts", "threads")),
        ("scale", c_double),
    ]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # a graph cannot hold the lock behind it
def serves(dtype: torch.dtype) -> bool:
    """Whether compiled code is there and takes tensors of a dtype; float16 is widened."""
    return dtype in (*ARITHMETIC, torch.float16) and library() is not None


def forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, spent: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, T, D]`` and log-sum-exp ``[B, Hq, T]`` in float32; padding gets zeros and -inf.

    ``spent``, ``[len(STAGES)]`` float64, gets the seconds of each stage added, on one thread.
    """
    if q.dtype not in ARITHMETIC:
        out, lse = forward(q.float(), k.float(), v.float(), layout, scale, spent)
        return out.to(q.dtype), lse
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    if scale < 0:
        q, scale = -q, -scale
    _run("moba_forward", layout, scale, 1, spent, q=q, k=k, v=v, out=out, lse=lse)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``, accumulated in float32 and rounded once."""
    if q.dtype not in ARITHMETIC:
        wide = (dout.float(), q.float(), k.float(), v.float(), out.float())
        dq, dk, dv = backward(*wide, lse, layout, scale)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
    parts = min(_MOST_SUMS, max(1, torch.get_num_threads() // (k.shape[0] * k.shape[1])))
    dq = q.new_empty(q.shape)
    dk, dv = (x.new_empty(parts, *x.shape, dtype=x.dtype if parts == 1 else torch.float32) for x in (k, v))
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    _run("moba_backward", layout, scale, parts, None, dout=dout, q=q, k=k, v=v, out=out, lse=lse, dq=dq, dk=dk, dv=dv)
    dk, dv = (x[0] if parts == 1 else x.sum(0).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv


def _run(name: str, layout: Layout, scale: float, parts: int, spent: Tensor | None, **tensors: Tensor) -> None:
    q, k = tensors["q"], tensors["k"]
    batch = _Batch(
        **sizes(q, k),
        slots=k.shape[2],
        first=int(layout.q_start),  # on a CPU a tensor may be read
        block_size=layout.block_size,
        parts=parts,
        threads=1 if spent is not None else torch.get_num_threads(),
        scale=scale,
    )
    tables = {"doc": layout.doc, "pos": layout.pos}
    if layout.index is not None and layout.start is not None:
        index = layout.index if layout.index.dtype == torch.int16 else layout.index.int()
        tensors["index"], tables["start"] = index.contiguous(), layout.start
        batch.blocks, batch.reads, batch.index_bytes = layout.start.shape[1], index.shape[3], index.element_size()
    for each, x in tables.items():  # numbers of a row together; rows may be one
        tensors[each] = x if x.stride(1) == 1 else x.contiguous()
        setattr(batch, f"{each}_at", tensors[each].stride(0))
    if spent is not None:
        tensors["spent"] = spent
    point(batch, tensors)
    keep_heap()
    if getattr(library(), name)(byref(batch), ARITHMETIC[q.dtype]):
        raise MemoryError("attend: no memory left for what a thread of the CPU schedule holds; use fewer threads")
