"""Which rows a program holds and how it loads them: the beginnings that kernels share. Names: docs/kernels.md."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(ptr, at, ok, dims, D: tl.constexpr):
    """Rows at the offsets ``at``, zeros where not ``ok`` and beyond the head dim."""
    return tl.load(ptr + at[:, None] + dims[None, :], mask=ok[:, None] & (dims[None, :] < D), other=0.0)


@triton.jit
def row_and_head(pair, HKV):
    """Batch row and key head of a pair."""
    return (pair // HKV).to(tl.int64), (pair % HKV).to(tl.int64)


@triton.jit
def queries_of_tile(i, t0, tokens, G, BM: tl.constexpr):
    """Tile ``i`` of a pair's queries, heads of a group side by side: which are there, token and head in the group."""
    r = i * BM + tl.arange(0, BM)
    return r < tokens * G, (t0 + r // G).to(tl.int64), r % G


@triton.jit
def keys_of_tile(i, Lo, at, Begin, t0, tokens, G, BM: tl.constexpr, BN: tl.constexpr):
    """The keys that tile ``i`` reads in its own blocks, from the first query's ``Lo`` to the last query's slot.

    ``Lo`` never decreases along a row, padding included; ``at`` is where it begins for this one.
    """
    begin = tl.load(Lo + at + t0 + (i * BM) // G) // BN * BN
    end = tl.load(Begin) + t0 + tl.minimum((i * BM + BM - 1) // G + 1, tokens)
    return begin, end.to(tl.int32)


@triton.jit
def reads_of_tile(i, local, cell, Order, Edge, First, t0, tokens, G, W, BM: tl.constexpr):
    """Tile ``i`` of a cell's list: which are there, their numbers, token and head in the group."""
    j = tl.load(Edge + cell) + (i - tl.load(First + cell)) * BM + tl.arange(0, BM)
    ok = j < tl.load(Edge + cell + 1)
    read = tl.load(Order + j, mask=ok, other=0)
    row = read // W - local * (G * tokens)  # g * tokens + t
    return ok, read, (t0 + row % tokens).to(tl.int64), (row // tokens).to(tl.int64)
