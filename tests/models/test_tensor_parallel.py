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


def gradients(model: PreTrainedModel, **given: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(labels=ids(2, 40), input_ids=ids(2, 40), use_cache=False, **given).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def own_part(want: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Earlier releases of transformers keep plain parts of the weights, without a way to see the whole."""
    for dim, size in enumerate(like.shape):
        want = want if want.shape[dim] == size else want.chunk(2, dim)[torch.distributed.get_rank()]
    return want


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
                assert error(grad, own_part(alone[name], grad)) < 1e-5, name
        for i, rules in enumerate((MOBA, SPARSE)):
            half.set_attention(rules)
            assert torch.equal(half.generate(tokens, **GREEDY), generated[2 * i])
            assert torch.equal(half.generate(rows, attention_mask=mask, **GREEDY), generated[2 * i + 1])
        for how in ({"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk": 16}):
            assert torch.equal(half.generate(tokens, **GREEDY, **how), generated[2])
        with pytest.raises(UnsupportedError, match="kconv: its weights are not split over processes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "kconv", tp_plan="auto")(tokens)
        with pytest.raises(UnsupportedError, match="tensor parallelism: 1 key heads do not divide over the processes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "one", tp_plan="auto")(tokens)

    together(split)


def test_a_loss_of_a_part_of_the_head_is_refused() -> None:
    model = ours("llama", MOBA)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:48].detach())
    with pytest.raises(UnsupportedError, match="loss_only: tensor parallelism of this transformers"):
        gradients(model, loss_only=True)
