"""transformers' tensor parallelism on our classes: two processes compute what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import mobazoo
from mobazoo.errors import UnsupportedError
from tests.models.tiny import FAMILIES, MOBA, error, ids, ours, padded
from tests.train.test_many import together

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
SPARSE = [{**MOBA[0], "decode": "moba"}]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: PreTrainedModel, **given: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(labels=ids(2, 40), input_ids=ids(2, 40), use_cache=False, **given).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: whole(grad) for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize(
    "family, tied",
    [
        ("llama", False),
        pytest.param("llama", True, marks=pytest.mark.slow),
        pytest.param("qwen2", True, marks=pytest.mark.slow),
        pytest.param("qwen3", False, marks=pytest.mark.slow),
    ],
)
def test_heads_split_over_two_processes(family: str, tied: bool, tmp_path: Path) -> None:
    assert family in FAMILIES
    mobazoo.register()
    model = ours(family, MOBA, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "model")
    tokens = ids(2, 40)
    rows, mask = padded(tokens, [40, 29], "left")
    want = model(tokens).logits
    learned = [gradients(model), gradients(model, loss_only=True)]
    generated = [model.generate(tokens, **GREEDY), model.generate(rows, attention_mask=mask, **GREEDY)]
    model.set_attention(SPARSE)
    generated += [model.generate(tokens, **GREEDY), model.generate(rows, attention_mask=mask, **GREEDY)]
    assert not torch.equal(generated[0], generated[2])  # sparse decoding is something else here
    ours(family, [{**MOBA[0], "kconv": 3}]).save_pretrained(tmp_path / "kconv")
    ours(family, MOBA, num_key_value_heads=1).save_pretrained(tmp_path / "one")

    def split() -> None:
        half = AutoModelForCausalLM.from_pretrained(tmp_path / "model", tp_plan="auto")
        shares = [layer.self_attn.k_proj(torch.zeros(1, 48)).shape[-1] for layer in half.model.layers]
        assert shares == [model.model.layers[0].self_attn.head_dim] * 3  # one of two key heads
        with torch.no_grad():
            assert error(half(tokens).logits, want) < 1e-5
        for given, alone in zip(({}, {"loss_only": True}), learned, strict=True):
            found = gradients(half, **given)
            assert found.keys() == alone.keys()
            for name, grad in found.items():
                assert error(grad, alone[name]) < 1e-5, name
        for i, rules in enumerate((MOBA, SPARSE)):
            half.set_attention(rules)
            for how in ({}, {"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk": 16}):
                assert torch.equal(half.generate(tokens, **GREEDY, **how), generated[2 * i])
            assert torch.equal(half.generate(rows, attention_mask=mask, **GREEDY), generated[2 * i + 1])
        with pytest.raises(UnsupportedError, match="kconv: its weights are not split over processes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "kconv", tp_plan="auto")(tokens)
        with pytest.raises(UnsupportedError, match="tensor parallelism: 1 key heads do not divide over the processes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "one", tp_plan="auto")(tokens)

    together(split)
