"""One graph through torch's real compiler, forward and backward; other tests of one graph stop before code is made."""

from __future__ import annotations

import pytest
import torch

from tests.models.tiny import FAMILIES, MOBA, error, ids, ours


@pytest.mark.parametrize("family", ["llama", *[pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:]]])
def test_a_compiled_model_gives_the_same_loss_and_gradients(family: str) -> None:
    model = ours(family, [{**MOBA[0], "backend": "flash"}], num_hidden_layers=1)
    tokens = ids(2, 40)
    want = model(tokens, labels=tokens, use_cache=False)
    want.loss.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    got = torch.compile(model, fullgraph=True)(tokens, labels=tokens, use_cache=False)
    got.loss.backward()
    assert error(got.logits, want.logits) <= 1e-5
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert error(parameter.grad, grad) <= 1e-5
