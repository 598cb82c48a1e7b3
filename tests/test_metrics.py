"""Losses against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mobazoo import metrics
from mobazoo.errors import InputError
from mobazoo.metrics import Bucket, Estimate, by_position, estimate, mean_loss, paired, token_losses, trailing_loss

# Two texts of five tokens: four predictions each.
LOSSES = torch.tensor([[4.0, 3.0, 2.0, 1.0], [6.0, 3.0, 4.0, 3.0]])


def test_mean_and_standard_error() -> None:
    # Text means are 2.5 and 4: mean 3.25, sample deviation 1.5 / sqrt(2), error 1.5 / 2.
    assert mean_loss(LOSSES) == Estimate(3.25, pytest.approx(0.75))
    assert estimate(torch.tensor([1.0, 2.0, 3.0])) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)))
    assert estimate(torch.tensor([2.5])) == Estimate(2.5, None)


def test_trailing_loss_is_over_the_last_positions() -> None:
    assert trailing_loss(LOSSES, 1) == Estimate(2.0, pytest.approx(1.0))
    assert trailing_loss(LOSSES, 2) == Estimate(2.5, pytest.approx(1.0))
    assert trailing_loss(LOSSES, 4) == mean_loss(LOSSES)


def test_loss_by_position_counts_positions_from_one() -> None:
    assert by_position(LOSSES, 2) == [
        Bucket(1, 2, Estimate(4.0, pytest.approx(0.5))),
        Bucket(3, 4, Estimate(2.5, pytest.approx(1.0))),
    ]
    found = by_position(LOSSES, 3)
    assert [(bucket.first, bucket.last) for bucket in found] == [(1, 1), (2, 2), (3, 4)]
    assert [bucket.loss.mean for bucket in found] == [5.0, 3.0, 2.5]


def test_buckets_weigh_to_the_mean() -> None:
    losses = torch.rand(3, 1023, dtype=torch.float64)
    found = by_position(losses, 7)
    weighed = sum(bucket.loss.mean * (bucket.last - bucket.first + 1) for bucket in found) / 1023
    assert weighed == pytest.approx(mean_loss(losses).mean, rel=1e-12)
    assert {bucket.last - bucket.first + 1 for bucket in found} == {146, 147}


def test_paired_error_is_that_of_the_differences() -> None:
    # The texts differ by far more than the settings do: 1 and 2 nats a token.
    other = LOSSES + torch.tensor([[1.0], [2.0]])
    assert paired(other, LOSSES) == Estimate(1.5, pytest.approx(0.5))
    assert paired(LOSSES, LOSSES) == Estimate(0.0, 0.0)


def test_token_losses_by_hand() -> None:
    # The states are the logits; token 1 is predicted by the state of token 0.
    hidden = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0], [9.0, 9.0]]])
    found = token_losses(hidden, torch.tensor([[0, 1, 0]]), lambda x: x)
    assert found.tolist() == [[pytest.approx(math.log(2)), pytest.approx(-math.log(3 / 4))]]


def test_token_losses_never_has_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head, hidden, ids = nn.Linear(8, 50, bias=False), torch.randn(3, 20, 8), torch.randint(50, (3, 20))
    whole = token_losses(hidden, ids, head)
    logits = head(hidden[:, :-1])
    best = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 19)
    torch.testing.assert_close(whole, best)
    sizes: list[int] = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return head(x)

    monkeypatch.setattr(metrics, "_LOGITS", 4 * 50 * 7)
    torch.testing.assert_close(token_losses(hidden, ids, counted), whole)
    assert max(sizes) == 7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trailing_loss(LOSSES, 5), "trailing: want 1 to 4, the predicted tokens of a text, got 5"),
        (lambda: trailing_loss(LOSSES, 0), "trailing: want 1 to 4, the predicted tokens of a text, got 0"),
        (lambda: by_position(LOSSES, 5), "buckets: want 1 to 4, the predicted tokens of a text, got 5"),
        (lambda: paired(LOSSES, LOSSES[:1]), "paired: want the same texts, got [2, 4] and [1, 4]"),
    ],
)
def test_errors(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == message
