"""Tile sizes of the Triton kernels. Measured rows may be added per architecture; the rest takes what fits anywhere."""

from __future__ import annotations

from dataclasses import dataclass

# Shared memory holds two tiles of rows and two stages of streamed tiles: these stay under the 99 KiB of compute
# capability 8.6, and spill few registers or none. By bytes of one row of a head, ascending: rows in a tile, streamed
# rows, warps.
_SAFE = ((128, 128, 64, 8), (256, 64, 64, 8), (512, 64, 16, 8), (1 << 30, 32, 16, 8))
_STAGES = 2
_SMALLEST = 16  # tl.dot multiplies tiles of at least that


@dataclass(frozen=True, slots=True)
class Tiles:
    """One kernel launch: rows held, rows streamed past them, and how the compiler splits the work."""

    rows: int
    stream: int
    warps: int
    stages: int = _STAGES


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 16."""
    return max(_SMALLEST, 1 << (max(1, n) - 1).bit_length())


def tiles(dim: int, itemsize: int, rows: int, stream: int) -> Tiles:
    """Tiles for about ``rows`` rows against ``stream`` others.

    Args:
        dim: head dim.
        itemsize: bytes of a number.
        rows: how many there are to hold at the most, or on average where lists differ.
        stream: how many there are to stream.
    """
    width = power_of_two(dim) * itemsize
    most, streamed, warps = next(row[1:] for row in _SAFE if width <= row[0])
    return Tiles(min(most, power_of_two(rows)), min(streamed, power_of_two(stream)), warps)
