"""``attn_implementation="moba"`` and ``"moba_naive"`` in stock models, against zoo models and against no cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

import mobazoo
from mobazoo.attention import Segments
from mobazoo.integrations.transformers import moba_attention, moba_mask
from tests.models.tiny import MOBA, SIZES, STOCK, error, ids, ours, padded, stock

STOCKS = ("llama", "qwen2", "qwen3", "mistral")
NAMES = ("moba", "moba_naive")
SPARSE = [{**MOBA[0], "block_size": 4, "top_k": 3, "decode": "moba"}]
DENSE = [{**SPARSE[0], "decode": "full"}]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    mobazoo.register()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", STOCKS)
def test_without_rules_that_leave_anything_out_it_is_theirs(family: str, name: str) -> None:
    tokens, mask = padded(ids(3, 30), [30, 12, 5], "left")
    rules = [{"pattern": "moba", "block_size": 10, "top_k": 3}]
    want = stock(family, "eager")(tokens, attention_mask=mask).logits
    got = stock(family, name, rules)(tokens, attention_mask=mask).logits
    assert error(got[mask.bool()], want[mask.bool()]) <= 1e-5
    assert error(stock(family, name, [])(tokens).logits, stock(family, "eager")(tokens).logits) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_it_is_what_zoo_models_compute(family: str, side: str) -> None:
    mine, theirs = ours(family, MOBA), stock(family, "moba", MOBA)
    theirs.load_state_dict(mine.state_dict())
    tokens, mask = padded(ids(3, 40), [40, 29, 8], side)
    for given in (None, mask):
        got, want = theirs(tokens, attention_mask=given).logits, mine(tokens, attention_mask=given).logits
        real = mask.bool() if given is not None else torch.ones_like(mask).bool()
        assert error(got[real], want[real]) <= 1e-5
    assert error(theirs(tokens).logits, stock(family, "eager")(tokens).logits) > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", STOCKS)
def test_padded_equals_unpadded(family: str, side: str, name: str) -> None:
    model = stock(family, name, MOBA)
    rows, lengths = ids(3, 40), [40, 29, 8]
    tokens, mask = padded(rows, lengths, side)
    got = model(tokens, attention_mask=mask).logits
    for b, n in enumerate(lengths):
        assert error(got[b][mask[b].bool()], model(rows[b : b + 1, 40 - n :]).logits[0]) <= 1e-5


@pytest.mark.parametrize("use_cache", [None, False, True])
@pytest.mark.parametrize("family", STOCKS)
def test_packed_equals_separate(family: str, use_cache: bool | None) -> None:
    model = stock(family, "moba", MOBA)
    tokens, lengths = ids(1, 50), [21, 5, 24]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    got = model(tokens, position_ids=position_ids, use_cache=use_cache).logits[0].split(lengths)
    for part, logits in zip(tokens[0].split(lengths), got, strict=True):
        assert error(logits, model(part[None]).logits[0]) <= 1e-5


def recomputed(model: Any, sequence: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """Logits of the generated tokens from forwards without a cache, every token's own prefix at once."""
    grown = torch.cat([mask, mask.new_ones(mask.shape[0], sequence.shape[1] - mask.shape[1])], 1)
    position_ids = (grown.cumsum(1) - 1).clamp(min=0)
    logits = model(sequence, attention_mask=grown, position_ids=position_ids, use_cache=False).logits
    return logits[:, prompt - 1 : -1].transpose(0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 7},
        {"prefill_chunk_size": 7, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("family", "name"), [*[(f, "moba") for f in STOCKS], ("llama", "moba_naive")])
def test_sparse_generation_equals_recomputation(family: str, name: str, options: dict[str, Any]) -> None:
    model = stock(family, name, SPARSE)
    batch = 1 if "prompt_lookup_num_tokens" in options else 2
    tokens, mask = padded(ids(batch, 26), [26, 17][:batch], "left")
    out = model.generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=8,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    assert error(torch.stack(out.logits), recomputed(model, out.sequences, mask, 26)) <= 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_full_decoding_equals_a_zoo_model(cache: str) -> None:
    mine, theirs = ours("llama", DENSE), stock("llama", "moba", DENSE)
    theirs.load_state_dict(mine.state_dict())
    tokens, mask = padded(ids(2, 26), [26, 17], "left")
    options: Any = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, "cache_implementation": cache}
    assert torch.equal(theirs.generate(tokens, **options), mine.generate(tokens, **options))


def test_beams() -> None:
    model = stock("llama", "moba", SPARSE)
    tokens, mask = padded(ids(2, 20), [20, 9], "left")
    options: Any = {"attention_mask": mask, "num_beams": 3, "do_sample": False, "max_new_tokens": 8}
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))


def test_chunks_on_both_caches() -> None:
    model = stock("llama", "moba", SPARSE)
    tokens = ids(2, 33)
    want = model(tokens).logits
    for cache in (None, StaticCache(config=model.config, max_cache_len=40)):
        got, past = [], cache
        for chunk in tokens.split([10, 1, 22], dim=1):
            out = model(chunk, past_key_values=past, use_cache=True)
            past = out.past_key_values
            got.append(out.logits)
        assert error(torch.cat(got, 1), want) <= 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    tokens = ids(2, 40)
    grads = []
    for checkpointing in (False, True):
        model = stock("llama", "moba", MOBA).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_a_stock_model_compiles_in_one_graph() -> None:
    model = stock("llama", "moba", MOBA)
    tokens = ids(1, 40)
    want = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(compiled(tokens, use_cache=False).logits, want) <= 1e-5


def test_documents_are_found_once_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    made = Segments.from_position_ids.__func__
    monkeypatch.setattr(
        Segments, "from_position_ids", classmethod(lambda cls, *args: calls.append(args) or made(cls, *args))
    )
    stock("llama", "moba", MOBA)(ids(1, 40))
    assert len(calls) == 1


def refuse(match: str, kind: type[Exception] = mobazoo.UnsupportedError) -> Any:
    return pytest.raises(kind, match=match)


def test_missing_rules() -> None:
    with refuse("needs rules in the config: set config.moba", mobazoo.InputError):
        stock("llama", "moba")(ids(1, 4))


def test_wrong_rules_name_the_nearest_key() -> None:
    with refuse(r"moba.attention\[0\]: unknown key 'topk'; did you mean 'top_k'", mobazoo.InputError):
        stock("llama", "moba", [{"pattern": "moba", "block_size": 4, "topk": 3}])(ids(1, 4))
    model = stock("llama", "moba", MOBA)
    model.config.moba = {"attentions": []}
    with refuse("moba: unknown key 'attentions'; did you mean 'attention'", mobazoo.InputError):
        model(ids(1, 4))


def test_contexts_that_only_the_zoo_computes() -> None:
    model = stock("llama", "moba", MOBA)
    model.config.moba["rope"] = [{"type": "linear", "factor": 2.0, "original_max_position_embeddings": 256}]
    with refuse("moba.rope extends the context in a way that a stock model does not compute; use mobazoo.load"):
        model(ids(1, 4))


@pytest.mark.parametrize("family", STOCKS)
def test_rules_come_from_the_folders_own_config(family: str, tmp_path: Path) -> None:
    """``from_pretrained`` alone: the folder stays an ordinary one of its type."""
    stock(family, "eager", MOBA).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert (said["model_type"], said["moba"]) == (family, {"attention": MOBA})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="moba")
    assert type(loaded) is STOCK[family]
    assert error(loaded(ids(1, 40)).logits, stock(family, "moba", MOBA)(ids(1, 40)).logits) <= 1e-6
    assert error(loaded(ids(1, 40)).logits, stock(family, "eager")(ids(1, 40)).logits) > 1e-2


def test_key_convolution_needs_a_zoo_model() -> None:
    with refuse("kconv adds weights that a stock model does not have"):
        stock("llama", "moba", [{"kconv": 3}])(ids(1, 4))


def test_dropout() -> None:
    model = stock("llama", "moba", MOBA, attention_dropout=0.1)
    model(ids(1, 4))
    with refuse(r"cannot honour dropout=0\.1; turn it off"):
        model.train()(ids(1, 4))


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_sliding_windows(family: str) -> None:
    fields: Any = {"sliding_window": 8}
    if family == "qwen2":
        fields |= {"use_sliding_window": True, "max_window_layers": 1}
    with refuse("a sliding window or a mask of its own"):
        stock(family, "moba", MOBA, **fields)(ids(1, 20))


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("sliding_window", 8, "8"),
        ("softcap", 30.0, r"30\.0"),
        ("s_aux", torch.zeros(4), r"a tensor \[4\]"),
        ("something_new", 1, "1"),
        ("cu_seq_lens_q", torch.zeros(3), r"a tensor \[3\]"),
    ],
)
def test_options_that_would_change_the_result(name: str, value: Any, shown: str) -> None:
    model = stock("llama", "moba", MOBA)
    model(ids(1, 4), **{name: None})
    with refuse(f"cannot honour {name}={shown}; turn it off"):
        model(ids(1, 4), **{name: value})


def test_output_attentions() -> None:
    model = stock("llama", "moba", MOBA)
    with refuse("cannot honour output_attentions=True"):
        model(ids(1, 4), output_attentions=True)
    model.config._output_attentions = True
    with refuse("cannot honour output_attentions=True"):
        model(ids(1, 4))


def test_foreign_masks() -> None:
    model = stock("llama", "moba", MOBA)
    for mask in (torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool)):
        with refuse("given a foreign mask"):
            model(ids(1, 4), attention_mask=mask)


def test_padding_between_tokens() -> None:
    mask = torch.tensor([[1, 1, 0, 1]])
    with refuse("a row has padding between its tokens", mobazoo.InputError):
        stock("llama", "moba", MOBA)(ids(1, 4), attention_mask=mask)


def test_bidirectional_models() -> None:
    config = STOCK["llama"].config_class(**SIZES, is_causal=False)
    config.moba = {"attention": MOBA}
    model = STOCK["llama"]._from_config(config, attn_implementation="moba").eval()
    with refuse("a sliding window or a mask of its own"):
        model(ids(1, 4))


def test_options_of_the_call_itself() -> None:
    module = stock("llama", "moba", MOBA).model.layers[0].self_attn
    q, k = torch.zeros(1, 4, 4, 16), torch.zeros(1, 2, 4, 16)
    mask = moba_mask(1, 4, 4)
    out, weights = moba_attention(module, q, k, k, mask, is_causal=True, dropout=0.0, softcap=None, anything=False)
    assert out.shape == (1, 4, 4, 16)
    assert weights is None
    with refuse("cannot honour is_causal=False; turn it off"):
        moba_attention(module, q, k, k, mask, is_causal=False)
    with refuse("given a foreign mask: None"):
        moba_attention(module, q, k, k, None)
