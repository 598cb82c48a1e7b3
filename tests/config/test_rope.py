"""Steps of longer contexts in ``moba.rope``: what is one and what is not."""

from __future__ import annotations

from typing import Any

import pytest

from mobazoo.config.rope import RopeStep, rope_steps
from mobazoo.errors import InputError

STEP = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}


def test_steps() -> None:
    assert rope_steps(None) == rope_steps({}) == rope_steps({"rope": []}) == ()
    assert rope_steps({"rope": [STEP, {**STEP, "type": "linear"}]}) == (
        RopeStep("yarn", 4.0, 8192),
        RopeStep("linear", 4.0, 8192),
    )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (STEP, r"moba.rope: want a list of steps like .*, got \{"),
        (["yarn"], r"moba.rope\[0\]: want a mapping with type, factor, original_max_position_embeddings, got 'yarn'"),
        ([{"type": "yarn"}], r"moba.rope\[0\]: want a mapping with type, factor"),
        ([STEP, {**STEP, "beta": 1}], r"moba.rope\[1\]: unknown key 'beta'"),
        ([{**STEP, "type": "ntk"}], r"moba.rope\[0\].type: want one of linear, yarn, got 'ntk'"),
        ([{**STEP, "factor": 1}], r"moba.rope\[0\].factor: want a number > 1, got 1"),
        ([{**STEP, "factor": float("nan")}], r"moba.rope\[0\].factor: want a number > 1, got nan"),
        ([{**STEP, "factor": "2"}], r"moba.rope\[0\].factor: want a number > 1, got '2'"),
        (
            [{**STEP, "original_max_position_embeddings": 0}],
            r"moba.rope\[0\].original_max_position_embeddings: want an integer >= 1, got 0",
        ),
    ],
)
def test_what_is_no_step(said: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rope_steps({"rope": said})
