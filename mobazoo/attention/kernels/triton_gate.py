"""The gate's kernels: means of blocks in one pass over keys, and scores with their top-k in registers.

Layouts, names and operation counts: docs/kernels.md.
"""

import triton
import triton.language as tl

from mobazoo.attention.kernels.triton_rows import load_rows, queries_of_tile, row_and_head

HIDDEN = tl.constexpr(-(1 << 31))  # below the int32 of every score
SMALLEST = tl.constexpr(-(1 << 63))  # with the number of an empty place added, still below every key of a score
BIGGEST = tl.constexpr((1 << 63) - 1)


@triton.jit(do_not_specialize=["N", "BS", "HKV"])
def means(
    K, Start, Mean, k_b, k_h, k_s, N, BS, HKV,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The mean of one block's keys: float32 sums, rounded once; zeros where there is no block."""
    n = tl.program_id(0)
    pair = tl.program_id(1)
    b, h = row_and_head(pair, HKV)
    start = tl.load(Start + b * N + n).to(tl.int64)
    dims = tl.arange(0, DP)
    total = tl.zeros([BM, DP], tl.float32)
    for r in range(0, tl.where(start < 0, 0, BS), BM):
        row = r + tl.arange(0, BM)
        total += load_rows(K, b * k_b + h * k_h + (start + row) * k_s, row < BS, dims, D).to(tl.float32)
    mean = tl.div_rn(tl.sum(total, 0), BS.to(tl.float32))
    at = ((b * HKV + h) * N + n) * D
    tl.store(Mean + at + dims, mean.to(Mean.dtype.element_ty), mask=dims < D)


@triton.jit
def ordered(scores):
    """float32 as int32 of the same order, -0.0 equal to 0.0."""
    bits = scores.to(tl.int32, bitcast=True)
    sign = bits >> 31  # 0 or -1
    return ((bits & 0x7FFFFFFF) ^ sign) - sign


@triton.jit(do_not_specialize=["T", "N", "HKV", "G", "W"])
def gate(
    Q, Mean, From, To, Index, q_b, q_h, q_t, m_b, m_h, m_n, T, N, HKV, G, W,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The best W of the blocks ``From`` .. ``To`` - 1 of each query of a tile.

    A key is a score in the high word and its block's number in the low one. Each row keeps its W best keys, in no
    order, in ``kept``. Tiles of blocks are visited from the most recent to the oldest, so that a block that equals the
    worst one kept never enters, and comparing scores alone decides who does.
    """
    i = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries have the most blocks: they begin first
    pair = tl.program_id(1)
    b, h = row_and_head(pair, HKV)
    ok, t, g = queries_of_tile(i, 0, T, G, BM)
    first = tl.load(From + b * T + t, mask=ok, other=0).to(tl.int32)
    stop = tl.load(To + b * T + t, mask=ok, other=0).to(tl.int32)
    # 1 where a query chooses, 0 where it reads all it may, which scores nothing. A number, because Triton 3.6 loses the
    # layout of a condition that is used in several (its pass that removes layout conversions fails).
    chooses = tl.minimum(tl.maximum(stop - first - W, 0), 1)
    low = tl.min(first + (1 - chooses) * N, 0)
    end = stop * chooses
    high = tl.max(end, 0)
    head = h * G + g
    dims = tl.arange(0, DP)
    q = load_rows(Q, b * q_b + head * q_h + t * q_t, ok, dims, D)
    place = tl.zeros([BM, KEPT], tl.int64) + tl.arange(0, KEPT)[None, :]
    kept = tl.where(place < W, SMALLEST + place, BIGGEST)
    for tile in range(tl.cdiv(tl.maximum(high - low, 0), BN)):
        col = high - (tile + 1) * BN + tl.arange(0, BN)
        mean = load_rows(Mean, b * m_b + h * m_h + col.to(tl.int64) * m_n, col >= low, dims, D)
        scores = ordered(tl.dot(q, tl.trans(mean), input_precision="ieee"))
        scores = tl.where((col[None, :] >= first[:, None]) & (col[None, :] < end[:, None]), scores, HIDDEN)
        best = tl.max(scores, 1)
        worst = tl.min(kept, 1)
        gain = best.to(tl.int64) - (worst >> 32)
        while tl.max(gain, 0) > 0:
            block = tl.max(tl.where(scores == best[:, None], col[None, :], -1), 1)
            key = (best.to(tl.int64) << 32) + block
            kept = tl.where((gain[:, None] > 0) & (kept == worst[:, None]), key[:, None], kept)
            # A row that takes nothing now takes nothing later: its best may go as well.
            scores = tl.where(col[None, :] == block[:, None], HIDDEN, scores)
            best = tl.max(scores, 1)
            worst = tl.min(kept, 1)
            gain = best.to(tl.int64) - (worst >> 32)
    kept = tl.where(place < W, kept, SMALLEST)
    at = ((b * (HKV * G) + head) * T + t) * W
    for w in range(W):
        key = tl.max(kept, 1)
        kept = tl.where(kept == key[:, None], SMALLEST, kept)
        recent = tl.where(stop - 1 - w >= first, stop - 1 - w, -1)
        block = tl.where((key >> 32) > HIDDEN, key.to(tl.int32), recent)  # nothing was kept where nothing was chosen
        tl.store(Index + at + w, block.to(Index.dtype.element_ty), mask=ok)
