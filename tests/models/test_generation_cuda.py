"""Caches on a GPU: a compiled static step, and keys and values in host memory. Run by ``make test-gpu``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.tiny import MOBA, ids, ours, padded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
WAYS: dict[str, dict[str, Any]] = {
    "growing": {},
    "static, compiled": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk": 9},
    "host": {"cache_implementation": "offloaded"},
    "host, chunks": {"cache_implementation": "offloaded", "prefill_chunk": 9},
}


@pytest.mark.parametrize("decode", ["full", "moba"])
@pytest.mark.parametrize("way", WAYS)
def test_generation_is_that_of_a_cpu(way: str, decode: str) -> None:
    model = ours("llama", [{**MOBA[0], "decode": decode}])
    tokens, mask = padded(ids(2, 40), [40, 29], "left")
    options: Any = {"do_sample": False, "max_new_tokens": 12}
    want = model.generate(tokens, attention_mask=mask, **options, use_cache=False)
    there = model.to("cuda")
    got = there.generate(tokens.cuda(), attention_mask=mask.cuda(), **options, **WAYS[way])
    assert torch.equal(got.cpu(), want)
