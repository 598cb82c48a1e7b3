"""transformers' tensor parallelism on our classes: two processes compute what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mobazoo
from mobazoo.errors import InputError, UnsupportedError
from tests.models.tiny import FAMILIES, MOBA, error, ids, ours
from tests.train.test_many import together


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "llama")]
)
def test_heads_split_over_two_processes(family: str, tmp_path: Path) -> None:
    mobazoo.register()
    model = ours(family, MOBA)
    model.save_pretrained(tmp_path / "model")
    tokens = ids(2, 40)
    want = model(tokens).logits
    generated = model.generate(tokens, do_sample=False, max_new_tokens=6, use_cache=False)
    ours(family, [{**MOBA[0], "kconv": 3}]).save_pretrained(tmp_path / "kconv")

    def split() -> None:
        half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", tp_plan="auto")
        shares = [layer.self_attn.k_proj(torch.zeros(1, 48)).shape[-1] for layer in half.model.layers]
        assert shares == [model.model.layers[0].self_attn.head_dim] * 3  # one of two key heads
        assert error(half(tokens).logits, want) < 1e-5
        assert torch.equal(half.generate(tokens, do_sample=False, max_new_tokens=6, use_cache=False), generated)
        with pytest.raises(InputError, match="holds 1 key heads"):
            half.generate(tokens, do_sample=False, max_new_tokens=6)
        with pytest.raises(UnsupportedError, match="kconv: its weights are not split over processes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "kconv", tp_plan="auto")(tokens)

    together(split)
