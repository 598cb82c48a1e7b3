"""What the models take and refuse, checkpointing, one graph, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

import mobazoo
from mobazoo.attention import Segments
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.nn import attention as nn_attention
from mobazoo.zoo import family_class
from tests.models.tiny import FAMILIES, MOBA, error, ids, ours, padded, sizes

MIXED = [{**MOBA[0], "backend": "flash"}, {"layers": -1, "pattern": "full", "backend": "sdpa"}]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    tokens = ids(2, 40)
    grads = []
    for checkpointing in (False, True):
        model = ours("qwen3", MIXED).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens, labels=tokens).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["plain", "packed", "packed with bounds", "padded"])
def test_one_graph(case: str) -> None:
    model = ours("llama", MIXED, num_hidden_layers=2)  # one of each kind
    tokens = ids(2, 40)
    options: dict[str, Any] = {}
    if case.startswith("packed"):
        options["position_ids"] = torch.cat([torch.arange(n) for n in (23, 17)]).expand(2, -1)
    if case.endswith("bounds"):
        options |= {"max_docs": 2, "max_len": 23}
    if case == "padded":
        tokens, options["attention_mask"] = padded(tokens, [40, 21], "left")
    want = model(tokens, labels=tokens, **options)
    want.loss.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, labels=tokens, use_cache=False, **options)
    got.loss.backward()
    assert error(got.logits, want.logits) <= 1e-5
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert error(parameter.grad, grad) <= 1e-5


def test_decoding_on_a_static_cache_is_one_graph() -> None:
    model = ours("llama", [{**MOBA[0], "decode": "moba"}], num_hidden_layers=2)
    tokens = ids(1, 30)
    want = model(tokens).logits
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(tokens[:, :25], past_key_values=cache)
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        for t in range(25, 30):
            out = step(tokens[:, t : t + 1], past_key_values=cache, decode_from=25)
            assert error(out.logits[:, 0], want[:, t]) <= 1e-5


def test_documents_are_found_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = ours("llama", MOBA), []
    seen: list[Segments] = []
    attend = nn_attention.attend
    made = Segments.single
    monkeypatch.setattr(Segments, "single", lambda *args: calls.append(args) or made(*args))
    monkeypatch.setattr(nn_attention, "attend", lambda *a, **kw: seen.append(kw["segments"]) or attend(*a, **kw))
    model(ids(1, 20))
    assert len(calls) == 1
    assert len(seen) == 3
    assert seen[0] is seen[1] is seen[2]


def test_naive_runs_every_layer_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    attend = nn_attention.attend
    monkeypatch.setattr(nn_attention, "attend", lambda *a, **kw: names.append(kw["backend"]) or attend(*a, **kw))
    model = ours("llama", MIXED)
    model(ids(1, 20))
    assert names == ["flash", "flash", "sdpa"]
    names.clear()
    model.set_attn_implementation("moba_naive")
    model.generate(ids(1, 20), max_new_tokens=2, do_sample=False)
    assert set(names) == {"reference"}
    made = type(model)._from_config(model.config, attn_implementation="moba_naive")
    assert made.config._attn_implementation == "moba_naive"


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
def test_other_implementations_are_refused(name: str, tmp_path: Path) -> None:
    model = ours("llama", MOBA)
    message = f"attn_implementation='{name}': zoo models take 'moba' or 'moba_naive'; choose full or MoBA attention"
    with pytest.raises(UnsupportedError, match=message):
        model.set_attn_implementation(name)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        type(model).from_pretrained(tmp_path, attn_implementation=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same_without_backends(family: str, tmp_path: Path) -> None:
    mobazoo.register()
    model = ours(family, MIXED, tie_word_embeddings=True)
    model.config.moba["provenance"] = {"source": "somewhere"}
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["model_type"] == f"moba_{family}"
    assert said["architectures"] == [type(model).__name__]
    rules = [{name: value for name, value in rule.items() if name != "backend"} for rule in MIXED]
    assert said["moba"]["attention"] == [{"layers": ":", **rules[0]}, rules[1]]
    assert said["moba"]["provenance"] == {"source": "somewhere"}
    assert model.config.moba["attention"] == MIXED
    tokens, mask = padded(ids(2, 30), [30, 12], "left")
    want = model(tokens, attention_mask=mask).logits
    for kind in (type(model), AutoModelForCausalLM):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert error(loaded(tokens, attention_mask=mask).logits, want) <= 1e-6
    assert type(AutoModel.from_pretrained(tmp_path)) is family_class(family, "Model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported; set it to 0"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; zoo models have silu"),
        ({"is_causal": False}, "is_causal=False is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    ],
)
def test_configs_that_would_be_ignored_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ours("llama", **fields)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_sliding_window_layers_are_refused(family: str) -> None:
    with pytest.raises(
        UnsupportedError, match=r"layer_types\[2\] is 'sliding_attention': zoo models have no such layers"
    ):
        ours(family, use_sliding_window=True, sliding_window=16, max_window_layers=2)


def test_fields_set_later_are_refused_too() -> None:
    config = family_class("llama", "Config")(**sizes("llama"))
    config.attention_dropout = 0.5
    with pytest.raises(UnsupportedError, match=r"attention_dropout=0\.5"):
        family_class("llama", "ForCausalLM")(config)


def test_rules_are_checked_when_a_model_is_made() -> None:
    with pytest.raises(InputError, match="layer 9 is not there; the model has 3"):
        ours("llama", [{"layers": 9}])
    with pytest.raises(InputError, match="attention: layer 0: unknown backend 'flashy'; known: auto, decode, flash"):
        ours("llama", [{"backend": "flashy"}])
    model = ours("llama", MOBA)
    for rules, message in (([{"backend": "flashy"}], "unknown backend"), ([{"topk": 1}], "unknown key 'topk'")):
        with pytest.raises(InputError, match=message):
            model.set_attention(rules)
    assert model.config.moba == {"attention": MOBA}


def test_a_backend_that_cannot_is_refused_by_the_call() -> None:
    with pytest.raises(UnsupportedError, match="backend 'sdpa' cannot do this"):
        ours("llama", [{**MOBA[0], "backend": "sdpa"}])(ids(1, 30))


def test_attention_matrices_are_refused() -> None:
    model = ours("llama", MOBA)
    for call in (model, model.model):
        with pytest.raises(UnsupportedError, match="output_attentions: block attention never builds the matrix"):
            call(ids(1, 4), output_attentions=True)
    with pytest.raises(UnsupportedError, match="output_attentions"):
        model.generate(ids(1, 4), output_attentions=True, return_dict_in_generate=True, max_new_tokens=1)


def test_continuous_batching_is_refused() -> None:
    model = ours("llama", MOBA)
    for call in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(
            UnsupportedError, match="generate_batch: continuous batching does not know MoBA; use generate"
        ):
            call([[1, 2]])


def test_unknown_arguments_are_refused_by_name() -> None:
    model = ours("llama", MOBA)
    with pytest.raises(TypeError, match="token_type_ids"):
        model(ids(1, 4), token_type_ids=ids(1, 4))
    with pytest.raises(ValueError, match="something"):
        model.generate(ids(1, 4), something=1)


def test_inputs_are_one_of_two() -> None:
    model = ours("llama")
    for given in ({}, {"input_ids": ids(1, 2), "inputs_embeds": torch.zeros(1, 2, 48)}):
        with pytest.raises(InputError, match="forward: pass either input_ids or inputs_embeds"):
            model(**given)


@pytest.mark.parametrize("shape", [(1, 4), (2, 5), (2, 3), (2, 1, 4, 4)])
def test_masks_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"attention_mask: want \[B, past \+ T\] = \[2, 4\] with 0 at padding, got"):
        ours("llama")(ids(2, 4), attention_mask=torch.ones(shape, dtype=torch.long))


def test_padding_between_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="row 0 has a document that is not contiguous"):
        ours("llama")(ids(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]]))


def test_packed_rows_and_caches() -> None:
    model = ours("llama", MOBA)
    packed = torch.cat([torch.arange(n) for n in (5, 7)])[None]
    assert model(ids(1, 12), position_ids=packed).past_key_values is None
    message = "packed rows with a KV cache: a cache holds one document a row; pass use_cache=False"
    for options in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(UnsupportedError, match=message):
            model(ids(1, 12), position_ids=packed, **options)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(UnsupportedError, match="position_ids restart inside a row that is cached"):
        model(ids(1, 12), position_ids=packed, past_key_values=cache)


def test_tuples_and_caches_as_asked() -> None:
    model = ours("llama", MOBA)
    logits, cache = model(ids(1, 9), return_dict=False)
    assert logits.shape == (1, 9, 97)
    assert cache.get_seq_length() == 9
    assert model(ids(1, 9), use_cache=False).past_key_values is None
    assert model.train()(ids(1, 9)).past_key_values is None
    assert model.model(ids(1, 9), return_dict=False)[0].shape == (1, 9, 48)
    assert len(model(ids(1, 9), output_hidden_states=True).hidden_states) == 4
