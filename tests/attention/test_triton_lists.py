"""Routing lists against a plain loop over reads, and the bounds that make their shapes static."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mobazoo.attention import Segments
from mobazoo.attention.kernels import triton_slabs
from mobazoo.attention.kernels.triton_lists import build, most_tiles
from mobazoo.attention.kernels.triton_slabs import Layout, Slab, slabs


@pytest.mark.parametrize("tile", [1, 4, 16])
@pytest.mark.parametrize("blocks", [1, 5, 40])
def test_lists_hold_each_read_once(blocks: int, tile: int) -> None:
    torch.manual_seed(0)
    index = torch.randint(-1, blocks, (3, 2, 11, 4), dtype=torch.int16)
    real = torch.rand(3, 11) > 0.2
    found = build(index, real, blocks, tile)
    expected: list[list[int]] = [[] for _ in range(3 * (blocks + 1))]
    for read, block in enumerate(index.flatten().tolist()):
        pair, t = read // 88, read // 4 % 11
        keep = block >= 0 and bool(real[pair, t])
        expected[pair * (blocks + 1) + (block if keep else blocks)].append(read)
        assert int(found.block[read]) == (block if keep else blocks)
    edge = found.edge.tolist()
    order = found.order.tolist()
    assert [order[a:b] for a, b in pairwise(edge)] == expected
    tiles = []
    for i, cell in enumerate(found.cell.tolist()):
        if cell < len(expected):
            begin = (i - int(found.first[cell])) * tile
            tiles.append((cell, expected[cell][begin : begin + tile]))
    assert all(part for _, part in tiles)
    for cell, reads in enumerate(expected):
        wanted = [] if cell % (blocks + 1) == blocks else reads
        assert [r for c, part in tiles if c == cell for r in part] == wanted


def test_most_tiles_is_reached_and_never_passed() -> None:
    """One read in each of the first cells and the rest in one is the worst there is."""
    for reads, cells, tile in [(9, 4, 4), (3, 8, 16), (100, 7, 16), (5, 5, 1)]:
        worst = 0
        for alone in range(min(cells, reads + 1)):
            worst = max(worst, alone + -(-(reads - alone) // tile))
        assert worst <= most_tiles(reads, cells, tile) <= worst + 1


def layout_of(segments: Segments, block_size: int, queries: int, begin: int) -> Layout:
    start = torch.tensor([[0, 16, 32, 48, -1]], dtype=torch.int32)
    index = torch.full((1, 2, queries, 2), -1, dtype=torch.int32)
    return Layout(segments.doc, segments.pos, index, start, torch.tensor([begin]), block_size, 1, queries)


def test_first_keys_and_last_readers() -> None:
    segments = Segments.from_lengths([[40, 20]], length=70)
    layout = layout_of(segments, 16, 60, 5)
    lo = layout.lo[0].tolist()
    for t in range(60):
        slot = t + 5
        own = slot - slot % 16 if slot < 40 else 40 + (slot - 40) // 16 * 16
        assert lo[t] == (own if slot < 60 else slot + 1)
    assert lo == sorted(lo)
    for tile in (8, 32):
        for number, stop in enumerate(layout.readers(tile)[0].tolist()):
            reads = [t for t in range(60) if lo[t] < (number + 1) * tile]
            assert stop == len(reads)
        first, end = (x[0].tolist() for x in layout.blocks_of(tile))
        for number in range(len(first)):
            touched = [n for n, s in enumerate((0, 16, 32, 48)) if s < (number + 1) * tile and s + 16 > number * tile]
            assert list(range(first[number], end[number])) == touched


def test_slabs_cover_everything_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(Segments.from_lengths([[60]]), 16, 60, 0)
    for limit in (1, 3000, 1 << 20):
        monkeypatch.setattr(triton_slabs, "SLAB_BYTES", limit)
        found = list(slabs(layout, group=2, row_bytes=64))
        assert [whole for whole, _ in found] == [Slab(0, 1, 0, 60)]
        tokens = [t for _, parts in found for s in parts for t in range(s.token, s.token + s.tokens)]
        assert tokens == list(range(60))
        per_token = 2 * 2 * (64 + triton_slabs._BYTES_PER_READ)
        assert all(s.tokens == 1 or s.tokens * per_token <= limit for _, parts in found for s in parts)


def test_parts_are_even_and_large_blocks_take_half() -> None:
    limit, per_token = triton_slabs.SLAB_BYTES, 1 << 10
    assert triton_slabs.cut(32, 1 << 19, per_token, 128) == (1, 1 << 19)
    assert triton_slabs.cut(32, (1 << 19) + 1, per_token, 128) == (1, (1 << 18) + 1)
    assert triton_slabs.cut(32, (1 << 19) + 1, per_token, 4096) == (1, ((1 << 19) + 1 + 2) // 3)
    assert triton_slabs.cut(10, limit // per_token // 4, per_token, 128) == (4, limit // per_token // 4)
    assert triton_slabs.cut(65536, 1, 1, 128) == (32768, 1)  # a launch has 65,535 programs side by side
    assert triton_slabs.cut(9, limit // per_token // 4, per_token, 128) == (3, limit // per_token // 4)
