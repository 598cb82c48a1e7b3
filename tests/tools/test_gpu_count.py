"""The counts behind docs/kernels.md: they add up, and the page shows what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.gpu.count import memory, page, parts, rounds, selections
from tools.gpu.shapes import SHAPES

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.mark.parametrize("name", SHAPES)
def test_passes_add_up_to_the_shapes_own_count(name: str) -> None:
    shape = SHAPES[name]
    found = {part.name: part for part in parts(shape)}
    forward = found["forward, routed"].tensor + found["forward, own"].tensor
    assert forward == shape.counted()["operations"]
    assert found["gate"].tensor == shape.counted()["gate_operations"]
    if shape.backward:  # seven products where the forward has two
        backward = found["dq, routed"].tensor + found["dq, own"].tensor + found["dk and dv"].tensor
        assert backward == 3.5 * forward


@pytest.mark.parametrize("name", SHAPES)
def test_memory_is_within_the_target(name: str) -> None:
    ours, full = memory(SHAPES[name])
    assert ours <= 1.13 * full  # of 1.15


def test_rounds_fall_from_all_to_few() -> None:
    found = rounds(2048, 7)
    assert found[0] == 7
    assert found[-1] < 3
    assert all(taken <= 7 for taken in found)
    fixed, ours = list(selections(2048, 7).values())[1:]
    assert ours < fixed


def test_the_page_shows_what_the_command_prints() -> None:
    shown = DOCS.read_text("utf-8").splitlines()
    assert [line for line in page().splitlines() if line not in shown and line.startswith(("|", "**", "Full"))] == []
