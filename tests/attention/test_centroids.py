"""Centroids: which blocks have one, and their means against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mobazoo.attention import Centroids, blocks, centroids
from mobazoo.attention.blocks import centroids_by
from tests.factories import Case, inputs, segments_of
from tests.marks import DTYPES
from tests.oracle import centroid, layout

CASES = {
    "whole": Case(((200,), (200,)), 16, hkv=2, dim=33),
    "packed": Case(((1, 120, -2, 1, 77), (-5, 190, -6)), 16, hkv=2, dim=33),
    "ones": Case(((3, -1, 6),), 1, hkv=1),
    "large_blocks": Case(((250, 150), (-200, 200)), 100, hkv=1),
}


def complete_blocks(rows: tuple[tuple[int, ...], ...], block_size: int) -> list[list[tuple[int, int]]]:
    """``(first slot, document)`` of every block that its document fills."""
    found = []
    for row in rows:
        slots = layout(row)
        found.append(
            [
                (s, here[0])
                for s, here in enumerate(slots)
                if here is not None
                and here[1] % block_size == 0
                and s + block_size <= len(slots)
                and slots[s + block_size - 1] == (here[0], here[1] + block_size - 1)
            ]
        )
    return found


def of(case: Case, k: torch.Tensor, by: str = "torch") -> Centroids:
    return centroids_by(by, k, case.block_size, segments_of(case.rows, str(k.device)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_and_table(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    k = inputs(case, dtype).k
    check_means(case, k, of(case, k))


def check_means(case: Case, k: torch.Tensor, got: Centroids) -> None:
    """Against the float64 oracle; tensors on a CPU."""
    dtype = k.dtype
    width = case.slots // case.block_size
    assert got.mean.shape == (len(case.rows), case.hkv, width, case.dim)
    assert got.mean.dtype == dtype
    assert got.start.dtype == got.doc.dtype == torch.int32
    for b, wanted in enumerate(complete_blocks(case.rows, case.block_size)):
        unused = [(-1, -1)] * (width - len(wanted))
        assert list(zip(got.start[b].tolist(), got.doc[b].tolist(), strict=True)) == wanted + unused
        assert (got.mean[b, :, len(wanted) :] == 0).all()
        for n, (start, _) in enumerate(wanted):
            for j in range(case.hkv):
                mean, doubt = centroid(k[b, j, start : start + case.block_size])
                assert ((got.mean[b, j, n].double() - mean).abs() <= doubt + torch.finfo(dtype).eps * mean.abs()).all()


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_means_are_rounded_once(name: str) -> None:
    """Sums kept in bfloat16 would lose most digits; nearly all means must be the correctly rounded ones."""
    case = CASES[name]
    k = inputs(case, torch.bfloat16).k
    got = of(case, k)
    exact = checked = 0
    for b, wanted in enumerate(complete_blocks(case.rows, case.block_size)):
        for n, (start, _) in enumerate(wanted):
            mean = k[b, :, start : start + case.block_size].double().mean(1).to(torch.bfloat16)
            exact += int((got.mean[b, :, n] == mean).sum())
            checked += mean.numel()
    assert exact / checked > 0.999


def test_gathering_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["packed"]
    k = inputs(case).k
    at_once = of(case, k)
    monkeypatch.setattr(blocks, "_GATHER_BYTES", 1)
    assert torch.equal(of(case, k).mean, at_once.mean)


def test_packed_path_equals_whole_path() -> None:
    """The same row, once known to be whole and once not: one table and means that differ by order of sums only."""
    case = CASES["whole"]
    k, segments = inputs(case).k, segments_of(case.rows)
    fast, general = (centroids(k, 16, replace(segments, whole=flag)) for flag in (True, False))
    assert torch.equal(fast.start, general.start)
    assert torch.equal(fast.doc, general.doc)
    assert torch.allclose(fast.mean, general.mean, atol=1e-6, rtol=0)


def test_strided_keys_give_the_same_means() -> None:
    case = CASES["packed"]
    k = inputs(case).k
    assert torch.equal(of(case, k).mean, of(case, k.transpose(1, 2).contiguous().transpose(1, 2)).mean)


def test_no_gradient() -> None:
    case = CASES["packed"]
    assert not of(case, inputs(case).k.requires_grad_()).mean.requires_grad


@pytest.mark.parametrize("block_size", [7, 8, 9, 50])
def test_no_complete_block(block_size: int) -> None:
    case = Case(((6, -1, 6),), block_size)
    got = of(case, inputs(case).k)
    assert (got.start == -1).all()
    assert got.start.shape == (1, 13 // block_size)
