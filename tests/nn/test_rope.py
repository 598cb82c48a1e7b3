"""Frequencies against transformers', dtypes, and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mobazoo.config.rope import RopeStep
from mobazoo.errors import UnsupportedError
from mobazoo.nn.rope import RotaryEmbedding, extend, inverse_frequencies, rotate

KINDS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
    {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]


def config(**rope: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=rope)


@pytest.mark.parametrize("rope", KINDS, ids=lambda rope: rope["rope_type"])
def test_angles_are_those_of_transformers(rope: dict[str, Any]) -> None:
    mine, theirs = RotaryEmbedding(config(**rope)), LlamaRotaryEmbedding(config(**rope))
    positions = torch.tensor([[0, 1, 31, 4096, 131071]])
    for dtype in (torch.float32, torch.bfloat16):
        got, want = mine(positions, dtype), theirs(torch.zeros(1, dtype=dtype), positions)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == dtype
            assert torch.equal(a[:, 0], b)


def test_rotation_keeps_lengths_and_depends_on_distance() -> None:
    rope = RotaryEmbedding(config(**KINDS[0]))
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0))

    def score(at: int, to: int) -> torch.Tensor:
        turned = [rotate(x, *rope(torch.tensor([[p]]), torch.float32)) for x, p in ((q, at), (k, to))]
        torch.testing.assert_close(turned[0].norm(), q.norm())
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), atol=1e-4, rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_frequencies_survive_casts_and_meta() -> None:
    exact = RotaryEmbedding(config(**KINDS[3]))
    for cast in (torch.bfloat16, torch.float64):
        assert torch.equal(RotaryEmbedding(config(**KINDS[3])).to(cast).inv_freq, exact.inv_freq)
    with torch.device("meta"):
        empty = RotaryEmbedding(config(**KINDS[3]))
    empty.to_empty(device="cpu").reset()
    assert torch.equal(empty.inv_freq, exact.inv_freq)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "something"])
def test_other_types_are_refused_by_name(kind: str) -> None:
    given = config(**KINDS[0])
    given.rope_parameters["rope_type"] = kind
    with pytest.raises(
        UnsupportedError, match=f"rope type '{kind}' is not supported; known: default, linear, llama3, yarn"
    ):
        RotaryEmbedding(given)


def test_half_turned_heads_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor=0\.5 is not supported"):
        RotaryEmbedding(config(**KINDS[0], partial_rotary_factor=0.5))


def test_steps_over_a_plain_rope_are_what_transformers_has() -> None:
    plain, magnitude = inverse_frequencies(config(**KINDS[0]))
    got, kept = extend(plain, magnitude, [RopeStep("linear", 8.0, 4096)])
    assert torch.equal(got, inverse_frequencies(config(**KINDS[1]))[0])
    assert kept == 1.0
    for theta, length in ((1e4, 4096), (5e5, 131072)):
        plain, magnitude = inverse_frequencies(config(rope_type="default", rope_theta=theta))
        scaled = {"rope_type": "yarn", "rope_theta": theta, "factor": 4.0, "original_max_position_embeddings": length}
        want, scale = inverse_frequencies(config(**scaled, truncate=False))
        got, kept = extend(plain, magnitude, [RopeStep("yarn", 4.0, length)])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        assert kept == pytest.approx(scale)
        assert not torch.allclose(got, plain, rtol=1e-2, atol=0)


@pytest.mark.parametrize("rope", KINDS, ids=lambda rope: rope["rope_type"])
def test_yarn_over_any_rope_by_its_definition(rope: dict[str, Any]) -> None:
    """Per frequency in float64: kept from 32 turns in the old context, divided below one, between by the logarithm."""
    stored, magnitude = inverse_frequencies(config(**rope))
    got, scale = extend(stored, magnitude, [RopeStep("yarn", 8.0, 131072)])
    seen = set()
    for before, after in zip(stored.double().tolist(), got.tolist(), strict=True):
        turns = 131072 * before / (2 * math.pi)
        share = min(max(math.log2(turns) / 5, 0.0), 1.0)  # 32 = 2 ** 5
        assert after == pytest.approx(before * share + before / 8 * (1 - share), rel=1e-5)
        seen.add("kept" if share == 1 else "divided" if share == 0 else "between")
    assert {"kept", "between"} <= seen
    assert scale == pytest.approx(magnitude * (1 + 0.1 * math.log(8)))


def test_steps_are_taken_in_order() -> None:
    stored, magnitude = inverse_frequencies(config(**KINDS[3]))
    first, second = RopeStep("linear", 2.0, 131072), RopeStep("yarn", 4.0, 262144)
    got = extend(stored, magnitude, [first, second])
    once = extend(stored, magnitude, [first])
    want = extend(*once, [second])
    assert torch.equal(got[0], want[0])
    assert got[1] == want[1]
    other, _ = extend(stored, magnitude, [second, first])
    assert not torch.equal(got[0], other)
