"""The Triton kernels compile for GPUs, which no interpreter proves: to machine code, without a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mobazoo.attention.kernels.triton_tiles import SHARED

ROOT = Path(__file__).parents[2]
KINDS = (("bf16", 64), ("bf16", 128), ("fp16", 256), ("fp32", 96), ("fp32", 256))
ALL = [(capability, *kind, *sizes) for capability in (80, 86, 90) for kind in KINDS for sizes in ((16, 1), (128, 63))]


# Bytes of a thread that may not fit into registers; a tile that spills more is too large.
SPILLED = 256


def compiled(folder: Path, *arguments: object) -> dict[str, tuple[int, int, int]]:
    """By kernel: bytes of shared memory, bytes that the table of tiles says, bytes of registers that did not fit."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.triton_compile", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = (line.split() for line in done.stdout.splitlines())
    return {name: (int(shared), int(counted), int(spill)) for name, shared, counted, spill, *_ in rows}


def fits(capability: int, found: dict[str, tuple[int, int, int]]) -> None:
    kernels = {"routed", "own", "delta", "queries_routed", "queries_own", "keys", "means", "gate"}
    assert set(found) == kernels
    assert all(shared <= counted <= SHARED[f"{capability / 10}"] for shared, counted, _ in found.values()), found
    assert all(spill <= SPILLED for *_, spill in found.values()), found


def test_for_hopper(tmp_path: Path) -> None:
    fits(90, compiled(tmp_path, 90, "bf16", 128, 128, 7))


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ALL, ids=lambda found: "-".join(map(str, found)))
def test_for_every_architecture(arguments: tuple[object, ...], tmp_path: Path) -> None:
    fits(int(str(arguments[0])), compiled(tmp_path, *arguments))
