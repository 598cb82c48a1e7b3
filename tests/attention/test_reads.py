"""Who reads which block on a CPU: every entry of the routes once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from mobazoo.attention.kernels import cpu_torch
from mobazoo.attention.kernels.cpu_reads import Reads, reads_by_block
from tests.factories import Case, inputs, oracle, random_routes, run, spy
from tests.tolerance import check

START = torch.tensor([0, 16, 32, 48, -1])


def some_index(heads: int, group: int, tokens: int, k: int) -> Tensor:
    """Routes of random blocks, some entries empty; nobody in the first key head reads block 1."""
    index = torch.randint(-1, 4, (heads, group, tokens, k), generator=torch.Generator().manual_seed(0))
    index[0][index[0] == 1] = -1
    return index.to(torch.int16)


def entries(index: Tensor, late: list[int]) -> Counter[tuple[int, int, int]]:
    """How often ``(key head, row of the head, first slot of a block)`` stands in ``index``."""
    heads, group, tokens, _ = index.shape
    return Counter(
        (h, g * tokens + t, int(START[n]))
        for h in range(heads)
        for g in range(group)
        for t in late
        for n in index[h, g, t].tolist()
        if n >= 0
    )


@pytest.mark.parametrize("late", [None, [3, 4, 9, 39]], ids=["all", "late"])
@pytest.mark.parametrize("tokens", [40, 9000])
@pytest.mark.parametrize("how", ["whole", "cut", "strided", "int32", "int64"])
def test_every_entry_is_read_once(tokens: int, late: list[int] | None, how: str) -> None:
    """Also of a range of tokens, of routes that lie otherwise in memory, and of wider numbers."""
    index = some_index(3, 2, tokens, 2)
    if how == "cut":
        index = torch.cat([index[:, :, :7], index, index[:, :, 7:]], 2)[:, :, 7 : tokens + 7]
    elif how == "strided":
        index = index.mT.contiguous().mT
    elif how == "int32":
        index = index.int()
    elif how == "int64":
        index = index.long()
    found = list(reads_by_block(index, START, None if late is None else torch.tensor(late)))
    seen = Counter(
        (head, row, k0)
        for head, reads in enumerate(found)
        for begin, count, k0 in reads.blocks
        for row in reads.rows[begin : begin + count].tolist()
    )
    assert seen == entries(index, list(range(tokens)) if late is None else late)
    for reads in found:
        for begin, count, _ in reads.blocks:
            assert reads.rows[begin : begin + count].diff().ge(0).all()


@pytest.mark.parametrize("most", [7, 1000])
def test_runs_are_short_and_hold_every_entry_once(most: int) -> None:
    index = some_index(2, 2, 40, 1)
    seen: Counter[tuple[int, int, int]] = Counter()
    longest = 0
    for head, reads in enumerate(reads_by_block(index, START, None)):
        for begin, count, k0 in reads.runs(most):
            assert 0 < count <= most
            longest = max(longest, count)
            seen.update((head, row, k0) for row in reads.rows[begin : begin + count].tolist())
    assert seen == entries(index, list(range(40)))
    assert longest == 7 if most == 7 else longest > 7  # of some blocks there are more readers
    assert list(Reads.none().runs(most)) == []


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("row", [(150,), (-30, 100, 20)], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_key_heads_together_are_right(heads: int, row: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit into a call, the last ones fewer, and runs of readers cut where few fit."""
    case = Case((row,), 8, 4, 2 * heads, heads, 16)
    together = spy(monkeypatch, cpu_torch, "own_forward", lambda given, _: len(given[3]))
    data, (routes, chosen) = inputs(case), random_routes(case)
    reference, truth = run(case, data, "reference", routes=routes), oracle(case, data, chosen)
    for most in (7, 150, 450, 8192):
        monkeypatch.setattr(cpu_torch, "TOKENS_PER_CALL", most)
        together.clear()
        check(run(case, data, "flash", routes=routes), truth, reference, "flash")
        assert max(together) == min(heads, max(1, most // 150))
