"""Tile lists against the token mask, tile by tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobazoo.attention import MoBA, Routes, Segments, centroids, route
from mobazoo.attention.backends.reference import token_mask
from mobazoo.attention.blockmask import block_mask, tile_density
from mobazoo.attention.tiles import TABLE_ENTRIES, ceil_div, kv_tile_size

HQ, HKV, DIM = 4, 2, 8


def rows(name: str) -> tuple[Segments, int, int | Tensor]:
    """Documents, T and q_start of a case."""
    if name == "whole":
        return Segments.single(2, 300), 300, 0
    if name == "packed":
        return Segments.from_lengths([[130, 1, 0, 200], [256, 40]], length=340), 340, 0
    if name == "left padded":
        mask = torch.ones(2, 300, dtype=torch.int64)
        mask[1, :171] = 0
        return Segments.from_attention_mask(mask), 300, 0
    if name == "last queries":
        return Segments.from_lengths([[150, 150], [300]], length=300), 37, 263
    if name == "shard":
        return Segments.from_lengths([[150, 150], [299]], length=300), 129, torch.tensor(100)
    raise KeyError(name)


CASES = ["whole", "packed", "left padded", "last queries", "shard"]


def routes_for(case: str, block_size: int, top_k: int) -> tuple[Routes, Segments, int, int | Tensor]:
    segments, length, q_start = rows(case)
    torch.manual_seed(block_size * 100 + top_k)
    k = torch.randn(segments.batch, HKV, segments.length, DIM)
    q = torch.randn(segments.batch, HQ, length, DIM)
    pattern = MoBA(block_size, top_k)
    return route(q, centroids(k, block_size, segments), pattern, segments, q_start), segments, length, q_start


def unpack(number: Tensor, which: Tensor) -> Tensor:
    """Bool table of the tiles in a list; a tile listed twice is an error."""
    listed = torch.arange(which.shape[-1]) < number[..., None]
    table = torch.zeros(which.shape, dtype=torch.int64).scatter_add_(-1, which.long(), listed.long())
    assert table.max() <= 1
    return table.bool()


def tiles_of(tokens: Tensor, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Which tiles of a token mask [B, H, T, S] have a visible pair, and which nothing else."""
    t, s = tokens.shape[2:]
    shape = (ceil_div(t, tile[0]) * tile[0], ceil_div(s, tile[1]) * tile[1])

    def cut(fill: bool) -> Tensor:
        padded = torch.full((*tokens.shape[:2], *shape), fill)
        padded[:, :, :t, :s] = tokens
        return padded.unflatten(3, (-1, tile[1])).unflatten(2, (-1, tile[0]))

    return cut(False).any(5).any(3), cut(True).all(5).all(3)


def check(routes: Routes | None, segments: Segments, length: int, q_start: int | Tensor, tile: tuple[int, int]) -> None:
    mask = block_mask(routes, segments, length, q_start, tile=tile)
    tokens = token_mask(segments, routes, length, q_start)
    some, every = tiles_of(tokens, tile)
    heads = mask.kv_indices.shape[1]
    assert heads in (1, tokens.shape[1])
    full = unpack(mask.full_kv_num_blocks, mask.full_kv_indices)
    partial = unpack(mask.kv_num_blocks, mask.kv_indices)
    torch.testing.assert_close(full.expand_as(every), every)
    torch.testing.assert_close(partial.expand_as(every), some & ~every)
    torch.testing.assert_close(unpack(mask.full_q_num_blocks, mask.full_q_indices), full.mT)
    torch.testing.assert_close(unpack(mask.q_num_blocks, mask.q_indices), partial.mT)
    b, h, t, s = (torch.arange(n).view(*(-1 if i == d else 1 for i in range(4))) for d, n in enumerate(tokens.shape))
    assert torch.equal(mask.mask_mod(b, h, t, s).expand_as(tokens), tokens)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("block_size", [1, 7, 64, 100, 256])
@pytest.mark.parametrize("top_k", [1, 2, 3, 50])
def test_tiles_are_those_of_the_token_mask(case: str, block_size: int, top_k: int) -> None:
    routes, *rest = routes_for(case, block_size, top_k)
    for tile in [(128, 128)] if block_size == 1 else [(128, 128), (16, 32)]:
        check(routes, *rest, tile)


@pytest.mark.parametrize("case", CASES)
def test_full_attention_tiles(case: str) -> None:
    for tile in [(128, 128), (16, 32)]:
        check(None, *rows(case), tile)


def test_blocks_in_any_order_and_no_blocks() -> None:
    routes, segments, length, q_start = routes_for("packed", 64, 3)
    order = torch.arange(routes.start.shape[1] - 1, -1, -1)
    index = torch.where(routes.index < 0, -1, order.shape[0] - 1 - routes.index)
    check(Routes(index, routes.start[:, order], 64), segments, length, q_start, (128, 128))
    short, segments, length, q_start = routes_for("whole", 301, 3)
    assert short.start.shape[1] == 0
    check(short, segments, length, q_start, (128, 128))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    args = routes_for("packed", 7, 3)
    whole = block_mask(*args, tile=(16, 32))
    monkeypatch.setattr("mobazoo.attention.blockmask._CHUNK_BYTES", 20_000)
    monkeypatch.setattr("mobazoo.attention.tiles._CHUNK_ENTRIES", 50)
    pieces = block_mask(*args, tile=(16, 32))
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_indices", "full_q_indices"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name))


@pytest.mark.parametrize("heads", [1, 32, 128])
@pytest.mark.parametrize("slots", [1, 100, 8192, 131072, 1 << 20])
@pytest.mark.parametrize("block_size", [None, 1, 100, 384, 512, 4096])
def test_the_table_is_bounded_and_tiles_fit_blocks(heads: int, slots: int, block_size: int | None) -> None:
    height = heads * ceil_div(slots, 128)
    size = kv_tile_size(height, slots, block_size)
    assert size % 128 == 0
    assert height * ceil_div(slots, size) <= max(TABLE_ENTRIES, height)
    if block_size and block_size % 128 == 0 and size < slots:
        assert block_size % size == 0 or size % block_size == 0


def test_a_million_tokens_of_32_heads_keep_tiles_within_blocks() -> None:
    assert kv_tile_size(32 * 8192, 1 << 20, 4096) == 4096


def test_density_is_one_for_everything_and_falls_where_queries_agree() -> None:
    segments = Segments.single(1, 2048)
    index = torch.full((1, 2, 2048, 1), -1)
    own_only = Routes(index, torch.arange(16)[None] * 128, 128)
    agreeing = torch.where(torch.arange(2048) >= 256, 0, -1).expand(1, 2, -1)[..., None]
    causal = 16 * 17 / 2
    assert tile_density(own_only, segments, 2048).item() == pytest.approx(16 / causal)
    assert tile_density(Routes(agreeing, own_only.start, 128), segments, 2048).item() == pytest.approx(30 / causal)
    dense = Routes(torch.zeros(1, 2, 2048, 0, dtype=torch.int64), own_only.start[:, :1], 2048)
    assert tile_density(dense, segments, 2048).item() == 1.0
