"""Tile sizes of the Triton kernels: measured rows by architecture, and a safe default that fits anywhere.

``tools/gpu_report.sh --section tiles`` measures candidates on the GPU it finds and prints rows for ``MEASURED``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

_SMALLEST = 16  # tl.dot multiplies tiles of at least that
_KEPT = 2048  # best keys of the gate's rows, 8 bytes each, that are held in registers beside the scores


@dataclass(frozen=True, slots=True)
class Tiles:
    """One kernel launch: rows held, rows streamed past them, and how the compiler splits the work."""

    rows: int
    stream: int
    warps: int
    stages: int = 2


# (compute capability, kernels, head dim, bytes of a number), head dims as powers of two. No GPU has been measured yet.
MEASURED: dict[tuple[str, str, int, int], Tiles] = {}

# Capabilities whose programs have the same shared memory and tensor cores as another's.
_LIKE = {"8.9": "8.6"}

_Table = dict[int, tuple[tuple[int, Tiles], ...]]

# By bytes of a number, then by head dim up to which they hold. All fit the 99 KiB of shared memory that a program may
# have on compute capability 8.6, and few registers are spilled or none. float32 multiplies without tensor cores, where
# every operand is in a register: its tiles are smaller.
_ATTENTION: _Table = {
    2: ((64, Tiles(128, 64, 8)), (128, Tiles(64, 64, 8)), (256, Tiles(64, 16, 8))),
    4: ((64, Tiles(64, 16, 8)), (128, Tiles(32, 16, 8)), (256, Tiles(32, 16, 8, 1))),
}
_GATE: _Table = {
    2: ((128, Tiles(64, 64, 4)), (256, Tiles(32, 32, 4))),
    4: ((32, Tiles(64, 64, 4)), (64, Tiles(64, 32, 8)), (128, Tiles(32, 32, 4)), (256, Tiles(32, 16, 4))),
}
DEFAULT: dict[str, _Table] = {"forward": _ATTENTION, "backward": _ATTENTION, "keys": _ATTENTION, "gate": _GATE}

# Bytes of shared memory that a program may have, by compute capability; unknown ones get the least.
SHARED = {"8.0": 163 << 10, "8.6": 99 << 10, "8.9": 99 << 10, "9.0": 227 << 10}

_BETWEEN_WARPS = 2 << 10

# Tiles of rows that a kernel holds, and that one stage streams.
_HELD = {"forward": 1, "backward": 2, "keys": 2, "gate": 1}
_STREAMED = {"forward": 2, "backward": 2, "keys": 2, "gate": 1}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 16."""
    return max(_SMALLEST, 1 << (max(1, n) - 1).bit_length())


def tiles(kernels: str, dim: int, itemsize: int, rows: int, stream: int, device: torch.device) -> Tiles:
    """Tiles for about ``rows`` rows against ``stream`` others.

    Args:
        kernels: ``forward``, ``backward`` (of queries), ``keys`` (their backward) or ``gate``.
        dim: head dim.
        itemsize: bytes of a number.
        rows: how many there are to hold at the most, or on average where lists differ.
        stream: how many there are to stream.
        device: where they run.
    """
    found = entry(kernels, dim, itemsize, capability(device))
    return Tiles(
        min(found.rows, power_of_two(rows)), min(found.stream, power_of_two(stream)), found.warps, found.stages
    )


def gate_tiles(dim: int, itemsize: int, rows: int, reads: int, blocks: int, device: torch.device) -> Tiles:
    """As ``tiles``, with fewer rows where each keeps many of its ``reads`` best ``blocks``."""
    most = max(_SMALLEST, _KEPT // (1 << (reads - 1).bit_length()))
    return tiles("gate", dim, itemsize, min(rows, most), blocks, device)


def entry(kernels: str, dim: int, itemsize: int, name: str) -> Tiles:
    """The table's row for a compute capability: measured there, on one like it, or the default."""
    width = power_of_two(dim)
    for known in (name, _LIKE.get(name)):
        if (row := MEASURED.get((known or "", kernels, width, itemsize))) is not None:
            return row
    return next(row for most, row in DEFAULT[kernels][itemsize] if width <= most)


@cache
def capability(device: torch.device) -> str:
    """``9.0`` and the like; empty where there is no GPU."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else ""


def shared_bytes(kernels: str, width: int, itemsize: int, held: Tiles) -> int:
    """Shared memory of a program at the most: tiles held, stages of streamed ones, and what passes between warps.

    Args:
        kernels: as in ``tiles``.
        width: head dim as a power of two.
        itemsize: bytes of a number.
        held: tiles.
    """
    tiles_of_rows = _HELD[kernels] * held.rows + held.stages * _STREAMED[kernels] * held.stream
    return tiles_of_rows * width * itemsize + _BETWEEN_WARPS
