"""The Triton kernels compile for GPUs, which no interpreter proves: to machine code, without a device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}  # bytes a program may have
KINDS = (("bf16", 64), ("bf16", 128), ("fp16", 256), ("fp32", 96))
ALL = [(capability, *kind, block_size) for capability in SHARED for kind in KINDS for block_size in (16, 128)]


def compiled(capability: int, element: str, dim: int, block_size: int, folder: Path) -> dict[str, tuple[int, int]]:
    """By kernel: bytes of shared memory, bytes of registers spilled."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.triton_compile", *map(str, (capability, element, dim, block_size))],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = (line.split() for line in done.stdout.splitlines())
    return {name: (int(shared), int(spilled)) for name, shared, spilled in rows}


def fits(capability: int, found: dict[str, tuple[int, int]]) -> None:
    assert set(found) == {"routed", "own", "delta", "queries_routed", "queries_own", "keys"}
    assert all(shared <= SHARED[capability] for shared, _ in found.values()), found


def test_for_hopper(tmp_path: Path) -> None:
    fits(90, compiled(90, "bf16", 128, 128, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "element", "dim", "block_size"), ALL)
def test_for_every_architecture(capability: int, element: str, dim: int, block_size: int, tmp_path: Path) -> None:
    fits(capability, compiled(capability, element, dim, block_size, tmp_path))
