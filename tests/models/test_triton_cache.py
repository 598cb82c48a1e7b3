"""The backend ``triton`` through a model's cache: its own gate on the cache's centroids, and the right logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mobazoo.attention import routing
from mobazoo.nn import attention as nn_attention
from mobazoo.nn.cache import MobaCache
from tests.factories import spy
from tests.marks import TRITON_ON
from tests.models.tiny import error, ids, ours, padded

RULE = {"layers": ":", "pattern": "moba", "block_size": 4, "top_k": 3, "decode": "moba", "backend": "triton"}
LENGTH, PROMPT = 30, 24
SPLITS = {"one shot": [30], "chunks and tokens": [11, 13, 1, 1, 4]}


@pytest.mark.parametrize("device", TRITON_ON)
@pytest.mark.parametrize(("split", "kind"), [("one shot", {}), ("chunks and tokens", {"max_length": 40})], ids=str)
def test_every_split_gives_the_same(
    split: str, kind: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, naive = (
        ours("llama", [{**RULE, "backend": backend}], num_hidden_layers=1).to(device)
        for backend in ("triton", "reference")
    )
    tokens, mask = padded(ids(2, LENGTH), [LENGTH, LENGTH - 7], "left")
    tokens, mask = tokens.to(device), mask.to(device)
    with torch.no_grad():
        want = naive(tokens, attention_mask=mask, decode_from=PROMPT, use_cache=False).logits
        gates = spy(monkeypatch, nn_attention, "route_by", lambda arguments, _: arguments[0])
        past, kept = 0, MobaCache(model.config, **kind)
        for new in SPLITS[split]:
            part, seen = tokens[:, past : past + new], mask[:, : past + new]
            got = model(part, attention_mask=seen, past_key_values=kept, decode_from=PROMPT).logits
            real = seen[:, past:].bool()
            assert error(got[real], want[:, past : past + new][real]) <= 1e-5
            past += new
    assert set(gates) == {routing.TRITON}
