"""A run on a GPU: bfloat16 over float32 weights, resumed, near the same run on a CPU. Run by ``make test-gpu``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mobazoo
from mobazoo.config.data import Data
from mobazoo.config.train import TrainRecipe
from mobazoo.errors import Stopped
from mobazoo.train import train

from .test_resume import stop_after

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
Make = Callable[..., TrainRecipe]


def test_mixed_precision_on_a_gpu(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"steps": 8, "validation": Data("stdlib", files=["tomllib/*.py"])}
    cpu = train(recipe(**fields, dest=str(tmp_path / "cpu")))
    gpu = {**fields, "device": "auto", "mixed": True}
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(Stopped):
            train(recipe(**gpu))
    there = train(recipe(**gpu))
    assert cpu.validation is not None
    assert there.validation is not None
    # Both learn the same rows from the same weights; bfloat16 keeps eight bits of each product.
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    fallen = first - there.validation.loss
    assert fallen > 0
    assert abs(there.validation.loss - cpu.validation.loss) < 0.1 * fallen
    assert {weight.dtype for weight in mobazoo.load(tmp_path / "out").parameters()} == {torch.float32}
