"""Own blocks by torch's operators: strips, the kernel's own causal tiles, and pieces that began before the queries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mobazoo.attention.kernels import cpu_own
from mobazoo.attention.kernels.cpu_own import own_tiles, strip_mask
from tests.factories import Case, inputs, oracle, random_routes, run
from tests.tolerance import check

CASES = {
    "early": Case(((1400,),), 200, 3, 4, 2, 16),  # 600 tokens read everything; blocks in strips
    "long blocks": Case(((2300,),), 1100, 2, 4, 2, 16),  # longer than any strip's keys
    "neighbours": Case(((600, 600, -9, 600),), 300, 1, 4, 2, 16),
    "began before": Case(((1500,),), 260, 2, 4, 2, 16, queries=700),
    "long before": Case(((1500,),), 1200, 1, 4, 2, 16, queries=200),
    "full": Case(((-3, 1300, 40), (600, 743)), 0, 1, 4, 2, 16),
}


pytestmark = pytest.mark.usefixtures("by_torch")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread takes heads of a group together where two share a call."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("name", CASES)
def test_own_blocks_are_right(name: str) -> None:
    case = CASES[name]
    data = inputs(case)
    routes, chosen = random_routes(case) if case.block_size else (None, [])
    reference = run(case, data, "reference", routes=routes, grad=True)
    check(run(case, data, "flash", routes=routes, grad=True), oracle(case, data, chosen), reference, "flash")


@pytest.mark.parametrize("block_size", [None, 1, 7, 64, 100, 300, 700, 1100])
@pytest.mark.parametrize("q_start", [0, 1, 650])
def test_every_query_reads_its_own_block_once(block_size: int | None, q_start: int) -> None:
    """Which keys the tiles of a row let each query read, against the definition."""
    documents = [(3, 1400), (1400, 1401), (1410, 2000)]
    early = 2 * block_size if block_size else 0
    got, want = (torch.zeros(2000, 2000, dtype=torch.int32) for _ in range(2))
    for tile in own_tiles(documents, block_size, early, q_start, 2000):
        causal = torch.ones(tile.q_len, tile.k_len, dtype=torch.int32)
        if tile.causal:
            causal = causal.tril(tile.k_len - tile.q_len)
        for piece in range(tile.count):
            on = piece * tile.stride
            queries = slice(tile.q_start + on, tile.q_start + on + tile.q_len)
            got[queries, tile.k_start + on : tile.k_start + on + tile.k_len] += causal
    for start, stop in documents:
        for slot in range(max(start, q_start), stop):
            pos = slot - start
            begin = 0 if block_size is None or pos < early else pos - pos % block_size
            want[slot, start + begin : slot + 1] = 1
    assert torch.equal(got, want)


def test_a_strip_reads_up_to_each_query() -> None:
    mask = strip_mask(3, 5, 2, torch.float64)
    expected = torch.zeros(3, 5).masked_fill(torch.ones(3, 5).triu(3).bool(), -torch.inf)
    assert torch.equal(mask, expected.repeat(2, 1).double())
    assert strip_mask(cpu_own.STRIP, cpu_own.STRIPPED, 1, torch.float32).shape == (cpu_own.STRIP, cpu_own.STRIPPED)


def test_masks_outlive_inference_mode() -> None:
    """A mask that inference made first serves training later."""
    cpu_own._widest_mask.cache_clear()
    case = CASES["neighbours"]
    data = inputs(case)
    routes, _ = random_routes(case)
    with torch.inference_mode():
        run(case, data, "flash", routes=routes)
    assert run(case, data, "flash", routes=routes, grad=True).gradients
