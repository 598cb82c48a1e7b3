"""The judge of the GPU report: it passes what is right, and says which result is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mobazoo.attention import Centroids, Routes, attend
from tools.gpu import tiles as gpu_tiles
from tools.gpu import verify as gpu_verify
from tools.gpu.shapes import SHAPES, inputs
from tools.gpu.verify import verify, verify_gate

SHAPE = replace(SHAPES["64k"].small(), query_heads=2)


def steeper(x: Tensor) -> Tensor:
    """The same numbers with half as much gradient again."""
    return 1.5 * x - 0.5 * x.detach()


@pytest.mark.parametrize("wrong", ["", "out", "dq", "sum of k dk", "sum of dv"])
def test_says_what_is_wrong(wrong: str) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, routes: Routes | None) -> Tensor:
        q = steeper(q) if wrong == "dq" else q
        k = steeper(k) if wrong == "sum of k dk" else k
        v = steeper(v) if wrong == "sum of dv" else v
        out = attend(q, k, v, pattern=SHAPE.pattern, backend="reference", routes=routes)
        return out + 0.1 * out.detach() if wrong == "out" else out

    errors = verify(SHAPE, inputs(SHAPE, "cpu"), run)
    also = {"sum of k dk"} if wrong == "dq" else set()  # the two are compared with each other
    assert {name for name, error in errors.items() if error > 1} == {wrong} - {""} | also


@pytest.mark.parametrize("wrong", ["", "means", "choice"])
def test_says_what_is_wrong_with_a_gate(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    centroids_by, route_by = gpu_verify.centroids_by, gpu_verify.route_by

    def means(*given: Any) -> Centroids:
        known = centroids_by(*given)
        return replace(known, mean=1.1 * known.mean) if wrong == "means" else known

    def choice(*given: Any) -> Routes:
        routes = route_by(*given)
        return replace(routes, index=routes.index.clamp(max=0)) if wrong == "choice" else routes  # the oldest block

    monkeypatch.setattr(gpu_verify, "centroids_by", means)
    monkeypatch.setattr(gpu_verify, "route_by", choice)
    errors = verify_gate(SHAPE, inputs(SHAPE, "cpu"), "torch")
    assert {name for name, error in errors.items() if error > 1} == {wrong} - {""}


def test_tiles_that_change_results_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def work() -> list[Tensor]:
        calls.append(1)
        return [torch.ones(9) + 0.1 * (len(calls) > 2)]  # the default is called twice

    monkeypatch.setattr(gpu_tiles, "works", lambda *_: {"forward": work})
    found = next(gpu_tiles.tune("cpu", 60.0))
    assert not found["right"]
    assert any(line.startswith("Wrong results: forward, head dim 16, Tiles(") for line in found["lines"])
