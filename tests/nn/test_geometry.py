"""Which tokens of a forward are of the prompt: on the host, and in a graph by the mask's width."""

from __future__ import annotations

import pytest
import torch

from mobazoo.nn.geometry import prompt_part

UNKNOWN = torch.tensor(0)  # a slot that only the device knows


@pytest.mark.parametrize(
    ("length", "start", "width", "prompt"),
    [
        (5, 20, None, 5),
        (5, 24, None, 2),
        (5, 26, None, 0),
        (5, 24, 29, 2),
        (1, UNKNOWN, 26, 1),
        (1, UNKNOWN, 27, 0),
        (4, UNKNOWN, 26, 4),
        (4, UNKNOWN, 28, 2),
        (4, UNKNOWN, 40, 0),
        # Nothing is known without a mask, or with one that has a column for every slot.
        (1, UNKNOWN, None, 0),
        (4, UNKNOWN, None, 4),
        (1, UNKNOWN, 60, 0),
        (4, UNKNOWN, 60, 4),
    ],
)
def test_prompt_part(length: int, start: int | torch.Tensor, width: int | None, prompt: int) -> None:
    mask = None if width is None else torch.ones(2, width)
    assert prompt_part(length, start, 26, mask, 60) == prompt
    assert prompt_part(length, start, None, mask, 60) == length
