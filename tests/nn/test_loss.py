"""The loss without logits against cross-entropy over all of them."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from mobazoo.nn import loss


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_loss_and_gradients_are_those_of_cross_entropy(
    items: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "_BYTES", 4 * 31 * chunk)
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(31, (2, 9))
    labels[0, 3:6] = -100
    kind = "mean" if items is None else "sum"
    want = cross_entropy(linear(hidden[:, :-1], weight).flatten(0, 1), labels[:, 1:].flatten(), reduction=kind)
    want = want / (items or 1)
    got = loss.head_loss(hidden, weight, labels, items)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-6)
    pairs = [torch.autograd.grad(3 * value, (hidden, weight)) for value in (got, want)]
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)


def test_bfloat16_is_no_worse_than_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 400, 32), torch.randn(200, 32) / 6
    labels = torch.randint(200, (1, 400))
    errors = []
    exact = [t.double().requires_grad_() for t in (hidden.bfloat16(), weight.bfloat16())]
    want = torch.autograd.grad(
        cross_entropy(linear(exact[0][:, :-1], exact[1]).flatten(0, 1), labels[:, 1:].flatten()), exact
    )
    for ours in (True, False):
        low = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
        logits = linear(low[0][:, :-1], low[1]).flatten(0, 1).float()
        value = loss.head_loss(low[0], low[1], labels) if ours else cross_entropy(logits, labels[:, 1:].flatten())
        errors.append(
            [(g.double() - w).abs().max() for g, w in zip(torch.autograd.grad(value, low), want, strict=True)]
        )
    assert all(own <= 1.5 * other for own, other in zip(*errors, strict=True))


def test_without_gradients_none_are_made() -> None:
    hidden, weight, labels = torch.randn(1, 6, 4), torch.randn(9, 4), torch.randint(9, (1, 6))
    with torch.no_grad():
        got = loss.head_loss(hidden, weight, labels)
    torch.testing.assert_close(got, cross_entropy(linear(hidden[0, :-1], weight), labels[0, 1:]))
