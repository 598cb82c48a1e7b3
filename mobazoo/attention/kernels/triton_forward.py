"""Forward kernels: reads of a block by tiles of gathered queries, and the own block with the merge.

Layouts and names: docs/kernels.md. A pair is a row with a key head; row ``r`` of a tile is token ``r // G`` and head
``r % G`` of its group. Log-sum-exps are to the base 2. Offsets into tensors are 64-bit.
"""

import triton
import triton.language as tl

from mobazoo.attention.kernels.triton_rows import (
    LOG2E,
    keys_of_tile,
    load_rows,
    queries_of_tile,
    reads_of_tile,
    row_and_head,
)


@triton.jit
def attend_tile(q, k, v, keep, acc, top, total, scale):
    """One tile of keys in the running softmax of ``q``'s rows: sum, maximum and normalizer, all float32."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    s = tl.where(keep, s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has read nothing yet
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(top - safe)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new, total * shrink + tl.sum(p, 1)


@triton.jit(do_not_specialize=["t0", "tokens", "pair0", "pairs", "N", "HKV", "G", "W"])
def routed(
    Q, K, V, Order, Edge, Cell, First, Start, Part, PartLse, scale,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, t0, tokens, pair0, pairs, N, BS,
    HKV, G, W,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tile ``i``: up to BM queries that read one block, with all its keys; a normalized result for each read."""
    i = tl.program_id(0)
    cell = tl.load(Cell + i)
    if cell < pairs * (N + 1):
        local = cell // (N + 1)
        b, h = row_and_head(pair0 + local, HKV)
        ok, read, t, g = reads_of_tile(i, local, cell, Order, Edge, First, t0, tokens, G, W, BM)
        dims = tl.arange(0, DP)
        q = load_rows(Q, b * q_b + (h * G + g) * q_h + t * q_t, ok, dims, D)
        begin = tl.load(Start + b * N + cell % (N + 1)).to(tl.int64)
        acc = tl.zeros([BM, DP], tl.float32)
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        for n in range(0, BS, BN):
            col = n + tl.arange(0, BN)
            inside = col < BS
            k = load_rows(K, b * k_b + h * k_h + (begin + col) * k_s, inside, dims, D)
            v = load_rows(V, b * v_b + h * v_h + (begin + col) * v_s, inside, dims, D)
            acc, top, total = attend_tile(q, k, v, inside[None, :], acc, top, total, scale)
        at = read.to(tl.int64) * D
        part = (acc / total[:, None]).to(Part.dtype.element_ty)
        tl.store(Part + at[:, None] + dims[None, :], part, mask=ok[:, None] & (dims[None, :] < D))
        tl.store(PartLse + read, top + tl.log2(total), mask=ok)


@triton.jit(do_not_specialize=["T", "S", "t0", "tokens", "pair0", "N", "HKV", "G", "W"])
def own(
    Q, K, V, Lo, Begin, Part, PartLse, Block, Out, Lse, scale,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, T, S, t0, tokens, pair0, N,
    HKV, G, W,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile of queries with the keys ``Lo`` .. own slot, then one softmax with what the routed pass left."""
    i = tl.program_id(0)
    local = tl.program_id(1)
    b, h = row_and_head(pair0 + local, HKV)
    ok, t, g = queries_of_tile(i, t0, tokens, G, BM)
    lo = tl.load(Lo + b * T + t, mask=ok, other=S)
    slot = tl.load(Begin) + t
    dims = tl.arange(0, DP)
    q = load_rows(Q, b * q_b + (h * G + g) * q_h + t * q_t, ok, dims, D)
    acc = tl.zeros([BM, DP], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    begin, end = keys_of_tile(i, Lo, b * T, Begin, t0, tokens, G, BM, BN)
    for n in range(begin, end, BN):
        col = n + tl.arange(0, BN).to(tl.int64)
        k = load_rows(K, b * k_b + h * k_h + col * k_s, col < S, dims, D)
        v = load_rows(V, b * v_b + h * v_h + col * v_s, col < S, dims, D)
        keep = (col[None, :] >= lo[:, None]) & (col[None, :] <= slot[:, None])
        acc, top, total = attend_tile(q, k, v, keep, acc, top, total, scale)
    read = (local * (G * tokens) + g * tokens + (t - t0).to(tl.int32)) * W
    for w in range(W):
        chosen = ok & (tl.load(Block + read + w, mask=ok, other=N) < N)
        lse = tl.load(PartLse + read + w, mask=chosen, other=float("-inf"))
        part = load_rows(Part, (read + w).to(tl.int64) * D, chosen, dims, D).to(tl.float32)
        new = tl.maximum(top, lse)
        safe = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(lse - safe)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        top = new
    nothing = total == 0.0
    out = acc / tl.where(nothing, 1.0, total)[:, None]
    at = (b * (HKV * G) + h * G + g) * T + t
    tl.store(
        Out + at[:, None] * D + dims[None, :],
        out.to(Out.dtype.element_ty),
        mask=ok[:, None] & (dims[None, :] < D),
    )
    tl.store(Lse + at, tl.where(nothing, float("-inf"), top + tl.log2(tl.where(nothing, 1.0, total))), mask=ok)
