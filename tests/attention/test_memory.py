"""Peak memory against bounds that are stated before anything runs, each in a process of its own."""

from __future__ import annotations

import sys

import pytest

from mobazoo.attention.native import library
from tests.memory import GIB, MIB, OVERHEAD, Peak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def test_the_probe_sees_memory(peak: Peak) -> None:
    """A buffer that is freed again counts, and a view does not."""
    assert peak("def work():\n    torch.ones(64 << 20).sum()") >= 256 * MIB
    assert peak("x = torch.ones(64 << 20)\ndef work():\n    return x[5:].view(-1)") < 32 * MIB


Gate = tuple[int, int, int, int, int, int, str]
GATES: dict[str, Gate] = {
    # tokens, query heads, key heads, D, blocks, top_k, dtype
    "many_tokens": (32 << 10, 1, 1, 8, 4096, 12, "float32"),
    "many_tokens_bfloat16": (64 << 10, 2, 1, 16, 1024, 3, "bfloat16"),
    "many_heads_one_query": (1, 512, 64, 64, 4096, 12, "bfloat16"),
}
LONG_GATE: Gate = (256 << 10, 1, 1, 8, 4096, 12, "float32")


@pytest.mark.parametrize("shape", [*GATES.values(), pytest.param(LONG_GATE, marks=pytest.mark.slow)], ids=str)
def test_gate(shape: Gate, peak: Peak) -> None:
    """Working memory beyond inputs and result below 1 GiB, as ``route`` promises, and far below all scores at once."""
    tokens, hq, hkv, dim, blocks, top_k, dtype = shape
    code = f"""
tokens, slots = {tokens}, max({tokens}, {blocks})
segments = Segments.single(1, slots)
start = (torch.arange({blocks}, dtype=torch.int32) * (slots // {blocks}))[None]
mean = torch.randn(1, {hkv}, {blocks}, {dim}, dtype=torch.{dtype})
known = Centroids(mean, start, torch.zeros_like(start))
q = torch.randn(1, {hq}, tokens, {dim}, dtype=torch.{dtype})
pattern = MoBA(slots // {blocks}, {top_k})
route(q[:, :, -1:], known, pattern, segments)
def work():
    return route(q, known, pattern, segments)
"""
    result = hq * tokens * (top_k - 1) * 2
    used = peak(code) - result
    all_scores = hq * tokens * blocks * 4
    assert used < GIB
    # Positions, ranges and their searches, 8 bytes a token each, and one chunk: what the code holds.
    chunk = 3 * MIB
    copies = hkv * blocks * dim * 4
    assert used < 12 * 8 * tokens + 8 * chunk + copies + OVERHEAD
    if all_scores > 2 * OVERHEAD:
        assert used < all_scores / 2


WITHOUT = "from mobazoo.attention.native import build\nbuild._library = lambda: None\n"


@pytest.mark.parametrize("by", ["compiled", "torch"])
def test_gate_of_many_places(by: str, peak: Peak) -> None:
    """The numbers of the most recent blocks, as int64 for every query, would be 400 MiB, and as much for a mask."""
    tokens, top_k = 256 << 10, 201
    code = f"""
segments = Segments.single(1, {tokens})
known = centroids(torch.randn(1, 1, {tokens}, 2), 1024, segments)
q = torch.randn(1, 1, {tokens}, 2)
def work():
    return route(q, known, MoBA(1024, {top_k}), segments)
"""
    used = peak((WITHOUT if by == "torch" else "") + code)
    assert used < tokens * (top_k - 1) * 2 + 8 * 24 * MIB + OVERHEAD


def test_gate_of_packed_rows(peak: Peak) -> None:
    """Positions, documents, ranges and what they are searched for: five int32 a token at once."""
    rows, tokens = 32, 256 << 10
    code = f"""
segments = Segments.from_lengths([[{tokens // 2}, {tokens // 2}]] * {rows})
known = centroids(torch.randn({rows}, 1, {tokens}, 2), 4096, segments)
q = torch.randn({rows}, 1, {tokens}, 2)
def work():
    return route(q, known, MoBA(4096, 2), segments)
"""
    assert peak(code) < rows * tokens * (2 + 5 * 4) + OVERHEAD


@pytest.mark.parametrize("block_size", [512, 64 << 10])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_centroids(packed: bool, block_size: int, peak: Peak) -> None:
    """Keys of 256 MiB in bfloat16, of which at most 128 MiB in float32 are copied at once, and as they are."""
    tokens, heads, dim = 128 << 10, 8, 128
    rows = f"Segments.from_lengths([[{tokens}, 0]], length={tokens})" if packed else f"Segments.single(1, {tokens})"
    code = f"""
segments = {rows}
segments = Segments(segments.doc, segments.pos, 1, {tokens}, whole={not packed})
k = torch.ones(1, {heads}, {tokens}, {dim}, dtype=torch.bfloat16)
small()
def work():
    return centroids(k, {block_size}, segments)
"""
    result = heads * tokens // block_size * dim * 2
    assert peak(code) < result + (128 + 64) * MIB + 40 * tokens + OVERHEAD


# All scores would be 16 GiB, scores of read keys 1.5 GiB.
TOKENS, HQ, HKV, DIM, BLOCK, TOP_K = 32 << 10, 4, 2, 64, 256, 3
ROUTES = HQ * TOKENS * (TOP_K - 1) * 2  # int16


def flash_code(dtype: str, grad: bool) -> str:
    return f"""
small(pattern=MoBA(16, 3), backend="flash")
q = torch.randn(1, {HQ}, {TOKENS}, {DIM}, dtype=torch.{dtype}, requires_grad={grad})
k, v = (torch.randn(1, {HKV}, {TOKENS}, {DIM}, dtype=torch.{dtype}, requires_grad={grad}) for _ in range(2))
dout = torch.randn_like(q)
def work():
    out = attend(q, k, v, pattern=MoBA({BLOCK}, {TOP_K}), backend="flash")
    return (out, torch.autograd.grad(out, (q, k, v), dout)) if {grad} else out
"""


def flash_result(dtype: str, grad: bool) -> int:
    """Bytes of output, log-sum-exp and gradients."""
    size = 4 if dtype == "float32" else 2
    return HQ * TOKENS * (DIM * size + 4) + (HQ + 2 * HKV) * TOKENS * DIM * size * grad


@pytest.mark.skipif(library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flash(dtype: str, grad: bool, peak: Peak) -> None:
    """Beyond results and routes, what cpu_compiled.py says that each of two threads holds, and what the gate held.

    - Forward: 8192 query rows (``MOST``), each with q, sums and two floats.
    - Backward: 16384 rows (``MOST_BACK``), each with q, dout, dq and two floats.
    - In bfloat16 one key head's dk and dv, in which it sums.
    - 512 keys and values as given, as rows and as columns, and in the backward their gradients: 8 arrays of 512 rows,
      as columns 4 times 144. A tile has 64 queries at most, in 6 copies, and 5 arrays of 144 scores for each.
    - Who reads which block, sorted, and own blocks' readers: an int32 for each entry and two for each row.

    All in float32, which bfloat16 is where the processor multiplies no other; else two of its numbers are a word. The
    gate before it has left to the heap what ``test_gate`` allows it.
    """
    rows, row = (16384, 3 * DIM * 4 + 8) if grad else (8192, 2 * DIM * 4 + 8)
    readers = rows * (TOP_K - 1 + 2) * 4
    laid = 8 * 4 * 144 * DIM * 4 + 64 * (6 * DIM + 5 * 144) * 4
    thread = rows * row + readers + laid + 2 * TOKENS * DIM * 4 * (grad and dtype == "bfloat16")
    gate = 12 * 8 * TOKENS + 8 * 3 * MIB + HKV * TOKENS // BLOCK * DIM * 4
    used = peak(flash_code(dtype, grad))
    assert used < flash_result(dtype, grad) + ROUTES + 2 * thread + gate


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flash_by_torch(dtype: str, grad: bool, peak: Peak) -> None:
    """Beyond the result: wide copies of one key head's queries, output and gradients, and ``TOKENS_PER_CALL`` rows."""
    group = HQ // HKV
    rows = group * TOKENS * DIM
    routes = ROUTES + 6 * group * TOKENS * (TOP_K - 1) * 8  # and one key head's sorted int64 entries and rows
    working = 4 * rows * 4  # q, out in the dtype and wide
    calls = 8 * 8192 * DIM * 4 * 2
    if grad:
        working += 6 * rows * 4 + 4 * TOKENS * DIM * 4  # dout, q, out, dq and their contiguous pieces; dk, dv
    if dtype == "bfloat16":
        working *= 2  # the kernel's own wide buffers come and go in sizes that the heap keeps
    used = peak(WITHOUT + flash_code(dtype, grad))
    assert used < flash_result(dtype, grad) + routes + working + calls + OVERHEAD
    assert used < TOKENS * TOKENS  # one byte a pair of one head


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_sdpa_packed_builds_no_square_mask(grad: bool, peak: Peak) -> None:
    """16K packed slots: a square mask of one row, in booleans, is 256 MiB, and 1 GiB as SDPA widens it."""
    slots = 16 << 10
    code = f"""
small(backend="sdpa")
segments = Segments.from_lengths([[{slots // 2}, {slots // 2 - 5}, 5]])
q, k, v = (torch.randn(1, 1, {slots}, 32, requires_grad={grad}) for _ in range(3))
def work():
    out = attend(q, k, v, backend="sdpa", segments=segments)
    return (out, torch.autograd.grad(out.sum(), (q, k, v))) if {grad} else out
"""
    chunk = (16 << 20) * (1 + 4)  # the entries of one chunk's mask, as booleans and widened
    assert peak(code) < 3 * chunk + 8 * slots * 32 * 4 + OVERHEAD
