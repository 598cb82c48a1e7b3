"""Documents packed into rows teach what they teach alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mobazoo.data.collate import IGNORED, Collator
from mobazoo.data.rows import Rows
from mobazoo.data.tokens import Tokens
from tests.models.tiny import VOCAB, ours

LENGTHS = (17, 5, 40, 9, 24, 3)  # with rows of 24 tokens one is cut, one fills a row, and the last row is padded


@pytest.mark.parametrize("fixed", [False, True])
def test_loss_and_gradients_are_those_of_separate_documents(fixed: bool) -> None:
    model = ours("qwen3", [{"pattern": "moba", "block_size": 4, "top_k": 2, "kconv": 3}]).double()
    ids = torch.randint(2, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    learn = torch.rand(len(ids), generator=torch.Generator().manual_seed(1)) < 0.8
    rows = Rows(Tokens(ids, learn, LENGTHS, ("",) * len(LENGTHS)), 24)
    batch = Collator(24, fixed=fixed)([rows[i] for i in range(len(rows))])
    assert isinstance(batch["labels"], torch.Tensor)
    items = (batch["labels"] != IGNORED).sum()

    def gradients() -> dict[str, torch.Tensor]:
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    given: dict[str, Any] = {"use_cache": False, "loss_only": True, "num_items_in_batch": items}
    packed = model(**batch, **given).loss
    packed.backward()
    together = gradients()
    alone = torch.zeros((), dtype=torch.float64)
    for start, size in [piece for row in rows.plan for piece in row]:
        tokens = ids[start : start + size].long()[None]
        labels = torch.where(learn[start : start + size], tokens, IGNORED)
        loss = model(tokens, labels=labels, **given).loss
        loss.backward()
        alone += loss.detach()
    torch.testing.assert_close(packed.detach(), alone, atol=1e-12, rtol=1e-12)
    separate = gradients()
    assert together.keys() == separate.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, separate[name], atol=1e-12, rtol=1e-9)
