"""Backward kernels: queries by tiles of their block's list, keys and values by tile of keys. No atomics anywhere.

Weights come back from the saved log-sum-exp (base 2); ``Delta`` is ``sum(dout * out)`` of each query. Names as in
``triton_forward``.
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


@triton.jit(do_not_specialize=["rows", "T", "HQ"])
def delta(Out, DOut, Delta, g_b, g_h, g_t, rows, T, HQ,
          D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """``sum(dout * out)`` of BM queries in float32."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    ok = r < rows
    dims = tl.arange(0, DP)
    t = r % T
    h = r // T % HQ
    b = r // T // HQ
    out = load_rows(Out, r * D, ok, dims, D).to(tl.float32)
    dout = load_rows(DOut, b * g_b + h * g_h + t * g_t, ok, dims, D).to(tl.float32)
    tl.store(Delta + r, tl.sum(out * dout, 1), mask=ok)


@triton.jit
def query_tile(q, dout, lse, moment, k, v, keep, dq, scale):
    """Adds one tile of keys to the gradient of ``q``'s rows, without the last factor ``scale``."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    p = tl.where(keep, tl.exp2(s - lse[:, None]), 0.0)
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    ds = p * (dp - moment[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def key_tile(q, dout, lse, moment, k, v, keep, dk, dv, scale):
    """Adds one tile of queries to the gradients of a tile of keys and values; ``keep`` is keys by queries."""
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
    p = tl.where(keep, tl.exp2(s - lse[None, :]), 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    ds = p * (dp - moment[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["T", "t0", "tokens", "pair0", "pairs", "N", "HKV", "G", "W"])
def queries_routed(
    Q, K, V, DOut, Lse, Delta, Order, Edge, Cell, First, Start, Part, scale,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_t, T, t0, tokens, pair0, pairs, N, BS,
    HKV, G, W,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tile ``i``: what one block gives to the gradients of up to BM queries that read it."""
    i = tl.program_id(0)
    cell = tl.load(Cell + i)
    if cell < pairs * (N + 1):
        local = cell // (N + 1)
        b, h = row_and_head(pair0 + local, HKV)
        ok, read, t, g = reads_of_tile(i, local, cell, Order, Edge, First, t0, tokens, G, W, BM)
        dims = tl.arange(0, DP)
        head = h * G + g
        q = load_rows(Q, b * q_b + head * q_h + t * q_t, ok, dims, D)
        dout = load_rows(DOut, b * g_b + head * g_h + t * g_t, ok, dims, D)
        at = (b * (HKV * G) + head) * T + t
        lse = tl.load(Lse + at, mask=ok, other=0.0)
        moment = tl.load(Delta + at, mask=ok, other=0.0)
        begin = tl.load(Start + b * N + cell % (N + 1)).to(tl.int64)
        dq = tl.zeros([BM, DP], tl.float32)
        for n in range(0, BS, BN):
            col = n + tl.arange(0, BN)
            inside = col < BS
            k = load_rows(K, b * k_b + h * k_h + (begin + col) * k_s, inside, dims, D)
            v = load_rows(V, b * v_b + h * v_h + (begin + col) * v_s, inside, dims, D)
            dq = query_tile(q, dout, lse, moment, k, v, ok[:, None] & inside[None, :], dq, scale)
        to = read.to(tl.int64) * D
        part = (dq * scale).to(Part.dtype.element_ty)
        tl.store(Part + to[:, None] + dims[None, :], part, mask=ok[:, None] & (dims[None, :] < D))


@triton.jit(do_not_specialize=["T", "S", "t0", "tokens", "pair0", "N", "HKV", "G", "W"])
def queries_own(
    Q, K, V, DOut, Lse, Delta, Lo, Begin, Part, Block, DQ, scale,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_t, T, S, t0, tokens, pair0, N,
    HKV, G, W,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of queries: their own blocks', and the sum of what the routed pass left."""
    i = tl.program_id(0)
    local = tl.program_id(1)
    b, h = row_and_head(pair0 + local, HKV)
    ok, t, g = queries_of_tile(i, t0, tokens, G, BM)
    lo = tl.load(Lo + b * T + t, mask=ok, other=S)
    slot = tl.load(Begin) + t
    dims = tl.arange(0, DP)
    head = h * G + g
    q = load_rows(Q, b * q_b + head * q_h + t * q_t, ok, dims, D)
    dout = load_rows(DOut, b * g_b + head * g_h + t * g_t, ok, dims, D)
    at = (b * (HKV * G) + head) * T + t
    lse = tl.load(Lse + at, mask=ok, other=0.0)
    moment = tl.load(Delta + at, mask=ok, other=0.0)
    dq = tl.zeros([BM, DP], tl.float32)
    begin, end = keys_of_tile(i, Lo, b * T, Begin, t0, tokens, G, BM, BN)
    for n in range(begin, end, BN):
        col = n + tl.arange(0, BN).to(tl.int64)
        k = load_rows(K, b * k_b + h * k_h + col * k_s, col < S, dims, D)
        v = load_rows(V, b * v_b + h * v_h + col * v_s, col < S, dims, D)
        keep = (col[None, :] >= lo[:, None]) & (col[None, :] <= slot[:, None])
        dq = query_tile(q, dout, lse, moment, k, v, keep, dq, scale)
    dq = dq * scale
    read = (local * (G * tokens) + g * tokens + (t - t0).to(tl.int32)) * W
    for w in range(W):
        chosen = ok & (tl.load(Block + read + w, mask=ok, other=N) < N)
        dq += load_rows(Part, (read + w).to(tl.int64) * D, chosen, dims, D).to(tl.float32)
    tl.store(
        DQ + at[:, None] * D + dims[None, :],
        dq.to(DQ.dtype.element_ty),
        mask=ok[:, None] & (dims[None, :] < D),
    )


@triton.jit(do_not_specialize=["T", "S", "pair0", "N", "tiles", "HKV", "G", "W"])
def keys(
    Q, K, V, DOut, Lse, Delta, Lo, Begin, Readers, BlockFrom, BlockTo, Order, Edge, Start, DK, DV, scale,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_t, T, S, pair0, tiles, N, BS,
    HKV, G, W,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """The gradients of BN keys and values: the queries of their own blocks, then the lists of their blocks."""
    tile = tl.program_id(0)
    local = tl.program_id(1)
    b, h = row_and_head(pair0 + local, HKV)
    col = tile * BN + tl.arange(0, BN).to(tl.int64)
    dims = tl.arange(0, DP)
    k = load_rows(K, b * k_b + h * k_h + col * k_s, col < S, dims, D)
    v = load_rows(V, b * v_b + h * v_h + col * v_s, col < S, dims, D)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    first = tl.load(Begin)
    stop = tl.load(Readers + b * tiles + tile)
    begin = tl.maximum(tile * BN - first, 0).to(tl.int32)
    for r0 in range(begin * G, stop * G, BM):
        r = r0 + tl.arange(0, BM)
        t = (r // G).to(tl.int64)
        ok = t < stop
        head = h * G + r % G
        lo = tl.load(Lo + b * T + t, mask=ok, other=S)
        keep = (col[:, None] >= lo[None, :]) & (col[:, None] <= (first + t)[None, :]) & ok[None, :]
        q = load_rows(Q, b * q_b + head * q_h + t * q_t, ok, dims, D)
        dout = load_rows(DOut, b * g_b + head * g_h + t * g_t, ok, dims, D)
        at = (b * (HKV * G) + head) * T + t
        lse = tl.load(Lse + at, mask=ok, other=0.0)
        moment = tl.load(Delta + at, mask=ok, other=0.0)
        dk, dv = key_tile(q, dout, lse, moment, k, v, keep, dk, dv, scale)
    if ROUTED:
        for n in range(tl.load(BlockFrom + b * tiles + tile), tl.load(BlockTo + b * tiles + tile)):
            start = tl.load(Start + b * N + n)
            inside = (col >= start) & (col < start + BS)
            cell = local * (N + 1) + n
            end = tl.load(Edge + cell + 1)
            for j0 in range(tl.load(Edge + cell), end, BM):
                j = j0 + tl.arange(0, BM)
                ok = j < end
                row = tl.load(Order + j, mask=ok, other=0) // W - local * (G * T)  # g * T + t
                head = h * G + row // T
                t = (row % T).to(tl.int64)
                q = load_rows(Q, b * q_b + head * q_h + t * q_t, ok, dims, D)
                dout = load_rows(DOut, b * g_b + head * g_h + t * g_t, ok, dims, D)
                at = (b * (HKV * G) + head) * T + t
                lse = tl.load(Lse + at, mask=ok, other=0.0)
                moment = tl.load(Delta + at, mask=ok, other=0.0)
                dk, dv = key_tile(q, dout, lse, moment, k, v, inside[:, None] & ok[None, :], dk, dv, scale)
    to = ((b * HKV + h) * S + col)[:, None] * D + dims[None, :]
    mask = (col < S)[:, None] & (dims[None, :] < D)
    tl.store(DK + to, (dk * scale).to(DK.dtype.element_ty), mask=mask)
    tl.store(DV + to, dv.to(DV.dtype.element_ty), mask=mask)
