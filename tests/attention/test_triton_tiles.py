"""The table of tiles: every row fits shared memory, and measured rows are taken where they were measured."""

from __future__ import annotations

import pytest
import torch

from mobazoo.attention import triton_runs
from mobazoo.attention.kernels import triton_tiles
from mobazoo.attention.kernels.triton_tiles import (
    DEFAULT,
    MEASURED,
    SHARED,
    Tiles,
    entry,
    gate_tiles,
    shared_bytes,
    tiles,
)

CPU = torch.device("cpu")
SAFE = min(SHARED.values())


@pytest.mark.parametrize("kernels", DEFAULT)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_default_fits_anywhere(width: int, itemsize: int, kernels: str) -> None:
    held = entry(kernels, width, itemsize, "no such GPU")
    assert shared_bytes(kernels, width, itemsize, held) <= SAFE == 99 << 10
    assert held.rows >= 16
    assert held.stream >= 16


def test_measured_rows_fit_where_they_were_measured() -> None:
    for (name, kernels, width, itemsize), held in MEASURED.items():
        assert shared_bytes(kernels, width, itemsize, held) <= SHARED[name]


def test_a_measured_row_is_for_its_architecture_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    row, usual = Tiles(32, 32, 4, 3), entry("forward", 128, 2, "")
    monkeypatch.setitem(MEASURED, ("8.6", "forward", 128, 2), row)
    assert entry("forward", 96, 2, "8.6") == entry("forward", 128, 2, "8.9") == row
    assert row != entry("forward", 128, 2, "8.0") == entry("forward", 128, 2, "9.0") == usual
    assert entry("backward", 128, 2, "8.6") == entry("backward", 128, 2, "")
    monkeypatch.setattr(triton_tiles, "capability", lambda _: "8.6")
    assert tiles("forward", 128, 2, 1000, 1000, CPU) == row
    assert tiles("forward", 128, 2, 17, 3, CPU) == Tiles(32, 16, 4, 3)


def test_a_gate_that_keeps_many_holds_fewer_rows() -> None:
    rows = [gate_tiles(128, 2, 1000, reads, 1000, CPU).rows for reads in (1, 32, 33, 64, 65, 128)]
    assert rows == [64, 64, 32, 32, 16, 16]


def test_first_use_says_that_it_compiles(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "mobazoo.attention"):
        triton_runs.begin.__wrapped__("gate", torch.bfloat16, 96, "cuda")
    assert caplog.messages == [
        "backend triton: the first gate in torch.bfloat16 with head dim 96 compiles its kernels, which takes seconds"
    ]
