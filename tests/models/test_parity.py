"""Zoo models with full attention against transformers' own, same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.models.tiny import FAMILIES, error, ids, ours, padded, pair, stock

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

CASES: list[tuple[str, dict[str, Any]]] = [
    *[(family, {}) for family in FAMILIES],
    *[(family, {"tie_word_embeddings": True}) for family in FAMILIES],
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True}),
    ("llama", {"num_key_value_heads": 4, "head_dim": None}),
    ("qwen3", {"num_key_value_heads": 1}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}),
    ("llama", {"rope_parameters": YARN}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen3", {"rope_parameters": YARN}),
    ("llama", {"rms_norm_eps": 1e-2}),
]


@pytest.mark.parametrize(("family", "fields"), CASES, ids=str)
def test_logits_loss_and_gradients(family: str, fields: dict[str, Any]) -> None:
    mine, theirs = pair(family, **fields)
    tokens = ids(2, 40)
    labels = tokens.clone()
    labels[0, :5] = -100
    got, want = mine(tokens, labels=labels), theirs(tokens, labels=labels)
    assert error(got.logits, want.logits) <= 1e-5
    assert error(got.loss, want.loss) <= 1e-5
    got.loss.backward()
    want.loss.backward()
    wants = dict(theirs.named_parameters())
    assert wants.keys() == dict(mine.named_parameters()).keys()
    for name, parameter in mine.named_parameters():
        scale = wants[name].grad.abs().max()
        assert (parameter.grad - wants[name].grad).abs().max() <= 1e-5 * scale + 1e-8, name


# What is asked of whole runs: each family, each rope scaling, tied embeddings.
RUNS: list[tuple[str, dict[str, Any]]] = [
    *[(family, {}) for family in FAMILIES],
    *[("llama", {"rope_parameters": rope}) for rope in (LINEAR, LLAMA3, YARN)],
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen3", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("family", "fields"), RUNS, ids=str)
def test_greedy_generation_token_by_token(family: str, fields: dict[str, Any]) -> None:
    mine, theirs = pair(family, **fields)
    options: Any = {"do_sample": False, "max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    got, want = mine.generate(ids(2, 20), **options), theirs.generate(ids(2, 20), **options)
    assert torch.equal(got.sequences, want.sequences)
    assert error(torch.stack(got.logits), torch.stack(want.logits)) <= 1e-5


@pytest.mark.parametrize(("family", "fields"), RUNS, ids=str)
def test_left_padded_batches(family: str, fields: dict[str, Any]) -> None:
    mine, theirs = pair(family, **fields)
    tokens, mask = padded(ids(3, 24), [24, 10, 1], "left")
    got, want = mine(tokens, attention_mask=mask).logits, theirs(tokens, attention_mask=mask).logits
    assert error(got[mask.bool()], want[mask.bool()]) <= 1e-5
    options: Any = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    assert torch.equal(mine.generate(tokens, **options), theirs.generate(tokens, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows(family: str) -> None:
    mine, theirs = pair(family)
    tokens = ids(1, 30)
    position_ids = torch.cat([torch.arange(n) for n in (7, 3, 20)])[None]
    want = theirs(tokens, position_ids=position_ids, use_cache=False).logits
    assert error(mine(tokens, position_ids=position_ids).logits, want) <= 1e-5
    bounds: Any = {"max_docs": 3, "max_len": 20}
    assert error(mine(tokens, position_ids=position_ids, **bounds).logits, want) <= 1e-5


@pytest.mark.parametrize(("family", "fields"), RUNS, ids=str)
def test_low_precision_is_no_worse_than_theirs(family: str, fields: dict[str, Any]) -> None:
    """Root mean square error against float64; 1.1 is room for another order of the same roundings."""
    mine, theirs = pair(family, attn="sdpa", **fields)
    tokens = ids(4, 64)
    exact = stock(family, "eager", **fields).double()
    exact.load_state_dict({name: value.bfloat16() for name, value in mine.state_dict().items()})
    want = exact(tokens).logits
    frequencies = theirs.model.rotary_emb.inv_freq.clone()
    errors = []
    for model in (mine.bfloat16(), theirs.bfloat16()):
        model.model.rotary_emb.inv_freq = frequencies  # as from_pretrained has them; a cast rounds transformers'
        errors.append((model(tokens).logits - want).square().mean().sqrt().item())
    assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize(
    ("step", "theirs"),
    [
        ({"type": "linear", "factor": 4.0}, LINEAR),
        ({"type": "yarn", "factor": 4.0}, {**YARN, "original_max_position_embeddings": 4096, "truncate": False}),
    ],
    ids=["linear", "yarn"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_contexts_extended_by_the_zoo_as_far_as_transformers_can_say_it(
    family: str, step: dict[str, Any], theirs: dict[str, Any]
) -> None:
    mine = ours(family, rope=[{**step, "original_max_position_embeddings": 4096}])
    other = stock(family, "eager", rope_parameters=theirs)
    other.load_state_dict(mine.state_dict())
    tokens = ids(2, 200)
    assert error(mine(tokens).logits, other(tokens).logits) <= 1e-5
    assert error(mine(tokens).logits, ours(family)(tokens).logits) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_embeddings_and_kept_logits(family: str) -> None:
    mine, theirs = pair(family)
    tokens = ids(2, 12)
    embeds = mine.get_input_embeddings()(tokens)
    got = mine(inputs_embeds=embeds, output_hidden_states=True, logits_to_keep=3)
    want = theirs(inputs_embeds=embeds, output_hidden_states=True, logits_to_keep=3)
    assert error(got.logits, want.logits) <= 1e-5
    assert len(got.hidden_states) == len(want.hidden_states) == 4
    for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
        assert error(a, b) <= 1e-5
    kept = torch.tensor([0, 5])
    assert error(mine(tokens, logits_to_keep=kept).logits, theirs(tokens, logits_to_keep=kept).logits) <= 1e-5


def test_loss_of_accumulated_batches_is_divided_as_theirs() -> None:
    mine, theirs = pair("llama")
    tokens = ids(2, 12)
    got, want = (model(tokens, labels=tokens, num_items_in_batch=50).loss for model in (mine, theirs))
    assert error(got, want) <= 1e-5
    assert mine.accepts_loss_kwargs


def test_positions_stay_exact_when_a_model_is_cast() -> None:
    model = ours("llama")
    before = model.model.rotary_emb.inv_freq.clone()
    assert torch.equal(model.bfloat16().model.rotary_emb.inv_freq, before)
