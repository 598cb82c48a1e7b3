"""Peak memory against bounds that are stated before anything runs, each in a process of its own."""

from __future__ import annotations

import sys

import pytest

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


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flash(dtype: str, grad: bool, peak: Peak) -> None:
    """Beyond the result: wide copies of one key head's queries, output and gradients, and ``_TOKENS_PER_CALL`` rows.

    32K tokens, 4 query and 2 key heads, D 64: all scores would be 16 GiB, scores of read keys 1.5 GiB.
    """
    tokens, hq, hkv, dim, block, top_k = 32 << 10, 4, 2, 64, 256, 3
    code = f"""
small(pattern=MoBA(16, 3), backend="flash")
q = torch.randn(1, {hq}, {tokens}, {dim}, dtype=torch.{dtype}, requires_grad={grad})
k, v = (torch.randn(1, {hkv}, {tokens}, {dim}, dtype=torch.{dtype}, requires_grad={grad}) for _ in range(2))
dout = torch.randn_like(q)
def work():
    out = attend(q, k, v, pattern=MoBA({block}, {top_k}), backend="flash")
    return (out, torch.autograd.grad(out, (q, k, v), dout)) if {grad} else out
"""
    size = 4 if dtype == "float32" else 2
    group = hq // hkv
    rows = group * tokens * dim
    result = hq * tokens * (dim * size + 4)
    # Routes as int16, and one key head's sorted int64 entries and rows.
    routes = hq * tokens * (top_k - 1) * 2 + 6 * group * tokens * (top_k - 1) * 8
    working = 4 * rows * 4  # q, out in the dtype and wide
    calls = 8 * 8192 * dim * 4 * 2
    if grad:
        result += (hq + 2 * hkv) * tokens * dim * size
        working += 6 * rows * 4 + 4 * tokens * dim * 4  # dout, q, out, dq and their contiguous pieces; dk, dv
    if dtype == "bfloat16":
        working *= 2  # the kernel's own wide buffers come and go in sizes that the heap keeps
    used = peak(code)
    assert used < result + routes + working + calls + OVERHEAD
    assert used < tokens * tokens  # one byte a pair of one head


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
