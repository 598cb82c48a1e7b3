"""Outputs and gradients of Moonshot's own naive MoBA code, see ``tests/fixtures/README.md``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.factories import Case, Inputs, chosen_by, gate_routes, oracle, run
from tests.marks import able, trains
from tests.tolerance import NAMES

FIXTURES = Path(__file__).parents[2] / "fixtures"
CASES = json.loads((FIXTURES / "moonshot_naive.json").read_text())
# The distance of the recorded float32 numbers from a float64 oracle, as stated with them.
RECORDED = 3e-6


@cache
def tensors() -> dict[str, Tensor]:
    return load_file(FIXTURES / "moonshot_naive.safetensors")


def load(name: str) -> tuple[Case, Inputs, dict[str, Tensor]]:
    """The case, its inputs as ``[1, heads, tokens, dim]`` and the recorded results in the same layout."""
    spec = CASES[name]
    case = Case(
        (tuple(spec["lengths"]),),
        spec["block_size"],
        spec["top_k"],
        spec["q_heads"],
        spec["kv_heads"],
        spec["head_dim"],
    )
    kept = {part: tensors()[f"{name}.{part}"].transpose(0, 1)[None] for part in ("q", "k", "v", "dout", *NAMES)}
    return case, Inputs(kept["q"], kept["k"], kept["v"], kept["dout"]), kept


@pytest.mark.parametrize("name", CASES)
def test_recorded_numbers_agree_with_our_oracle(name: str) -> None:
    case, data, recorded = load(name)
    expected = oracle(case, data, chosen_by(gate_routes(case, data.q, data.k)))
    for part, want in zip(NAMES, (expected.out, *expected.gradients), strict=True):
        assert (recorded[part].double() - want).abs().max() <= RECORDED, part


@pytest.mark.parametrize("backend", able(Case(((64,),), 16, 3)))
@pytest.mark.parametrize("name", CASES)
def test_backend_agrees_with_the_recorded_numbers(name: str, backend: str) -> None:
    """Both sides are float32 and each within ``RECORDED`` of the truth, so twice that is what they may differ."""
    case, data, recorded = load(name)
    result = run(case, data, backend, grad=trains(case, torch.float32, backend))
    for part, got in zip(NAMES, result.tensors, strict=False):
        assert (got - recorded[part]).abs().max() <= 2 * RECORDED, part
