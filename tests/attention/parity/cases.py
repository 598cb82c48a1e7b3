"""The grid: every block size with every top_k, over heads, head dims and geometries that have tails."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, product

from tests.factories import Case

BLOCK_SIZES = (1, 7, 64, 100)
TOP_KS = (1, 2, 3, 50)
_HEADS = ((2, 2), (4, 2), (8, 1))
_DIMS = (64, 33)


def _rows(block_size: int) -> tuple[tuple[int, ...], ...]:
    """Tails everywhere, 1-token documents first, last and between, padding on all sides, an empty row."""
    long = 3 * block_size + 19
    packed = (1, long, -2, 1, block_size + 3, 1)
    slots = sum(map(abs, packed))
    return packed, (-4, slots - 9, -5), (-slots,)


GRID = {
    f"b{block_size}k{top_k}": Case(_rows(block_size), block_size, top_k, hq, hkv, dim)
    for (block_size, top_k), (hq, hkv), dim in zip(
        product(BLOCK_SIZES, TOP_KS), cycle(_HEADS), cycle((*_DIMS, *reversed(_DIMS))), strict=False
    )
}

# T < S: the last queries (a chunk), one query (decode), queries in the middle of the row.
PARTIAL = {
    "chunk": Case(((110,), (-13, 97)), 7, 4, 4, 2, 64, queries=31),
    "decode": Case(((110,), (-13, 97), (20, 89, -1)), 16, 3, 8, 1, 64, queries=1),
    "middle": Case(((110,), (40, 70), (-60, 50)), 7, 3, 4, 2, 33, queries=45, first=22),
    "first": Case(((70, 40),), 16, 2, 2, 2, 64, queries=45, first=0),
}

WHOLE = {"whole": Case(((150,), (150,)), 16, 3, 4, 2, 64)}

SPARSE = GRID | PARTIAL | WHOLE
FULL = {name: case.full for name, case in (PARTIAL | WHOLE).items()} | {
    f"{heads[0]}to{heads[1]}d{dim}": Case(_rows(64), 0, 1, *heads, dim)
    for heads, dim in zip(_HEADS, (64, 33, 64), strict=True)
}

# What decoding is asked for many queries: they know nothing of each other there, and each costs as much as the first.
# These end a long document, pad, are a document of one token and begin another one.
FEW = {
    case: replace(case, queries=16, first=case.rows[0][1] - 7) for case in (SPARSE | FULL).values() if case.slots > 200
}

# For backends that compile: packed ones with small and large blocks, few and many, every group; a whole, a partial one.
CORE_SPARSE = ("b1k50", "b7k2", "b64k3", "whole", "middle")
CORE_FULL = ("4to2d33", "whole", "middle")
