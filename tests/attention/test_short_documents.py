"""Short documents on a CPU: a mask over unchosen blocks, or their readers block by block, and the same result."""

from __future__ import annotations

import pytest
import torch

from mobazoo.attention.kernels import cpu, cpu_masked
from mobazoo.attention.kernels.cpu_masked import short_documents
from tests.attention.parity.cases import SPARSE
from tests.factories import Case, inputs, oracle, random_routes, run, spy
from tests.tolerance import check

# A document whose mask is cut by queries and by key heads, padding on both sides, one that is all early.
LONG = Case(((-5, 700, 20), (300, 425)), 24, 3, 4, 2, 16)
CASES = SPARSE | {"long": LONG}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "by block"])
@pytest.mark.parametrize("name", CASES)
def test_either_way_is_right(name: str, masked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradients, for routes that leave out more than a gate would."""
    case = CASES[name]
    monkeypatch.setattr(cpu_masked, "_pays", lambda *_: masked)
    monkeypatch.setattr(cpu_masked, "_ENTRIES", 40_000)
    used = [spy(monkeypatch, cpu, each, lambda *_: 1) for each in ("masked_forward", "masked_backward")]
    data, (routes, chosen) = inputs(case, dtype), random_routes(case)
    reference = run(case, data, "reference", routes=routes, grad=True)
    check(run(case, data, "flash", routes=routes, grad=True), oracle(case, data, chosen), reference, "flash")
    assert all(map(bool, used)) == masked


def test_which_documents_are_short() -> None:
    """Few blocks left out, or blocks of few tokens; not those that read all, nor long ones."""

    def short(lengths: list[int], block_size: int, top_k: int, q_start: int = 0) -> list[tuple[int, int, int, int]]:
        stops = torch.tensor(lengths).cumsum(0).tolist()
        over = list(zip([0, *stops], stops, strict=False))
        begins = [begin for lo, hi in over for begin in range(lo, hi - block_size + 1, block_size)]
        early = block_size * top_k
        found = short_documents(over, torch.tensor([*begins, -1]), early, block_size, top_k, 2, q_start, stops[-1])
        return [tuple(each) for each in found]

    assert short([1280], 128, 8) == [(0, 1024, 1280, 0)]
    assert short([1024], 128, 8) == []
    assert short([1536], 128, 8) == []
    assert short([2048], 512, 2) == []
    assert short([1024], 16, 8) == [(0, 128, 1024, 0)]
    assert short([100, 1280, 1200], 128, 8) == [(100, 1124, 1380, 0), (1380, 2404, 2580, 10)]
    assert short([100, 1280, 1200], 128, 8, q_start=2000) == [(1380, 2404, 2580, 10)]
    assert short([1280], 128, 8, q_start=1200) == [(0, 1200, 1280, 0)]


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_both_passes_decide_alike_however_a_row_is_cut(lanes: int) -> None:
    """Weights are only as exact as both passes agree on their scores, and they cut rows differently."""
    begins = torch.arange(0, 2000, 100)
    for length in (1300, 1600, 2000):
        cuts = [(length * i // lanes, length * (i + 1) // lanes) for i in range(lanes)]
        found = [short_documents([(0, length)], begins, 800, 100, 8, 2, *cut) for cut in cuts]
        late = [cut for cut in cuts if cut[1] > 800]
        assert len([each for some in found for each in some]) in (0, len(late))


@pytest.mark.parametrize(("most", "calls"), [(2 * 2 * 128 * 304, 9), (2 * 50 * 304, 36)])
def test_a_mask_has_only_so_many_entries(most: int, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many heads there are: key heads are taken a few at a time, then queries; keys are whole blocks."""
    case = Case(((300,),), 16, 4, 12, 6, 16)
    monkeypatch.setattr(cpu_masked, "_ENTRIES", most)
    sizes = spy(monkeypatch, cpu, "masked_forward", lambda given, _: given[0].mask.untyped_storage().nbytes() // 4)
    data, (routes, chosen) = inputs(case), random_routes(case)
    reference = run(case, data, "reference", routes=routes)
    check(run(case, data, "flash", routes=routes), oracle(case, data, chosen), reference)
    assert len(sizes) == calls
    assert max(sizes) <= most
