"""Every way through a cache gives what a forward without one gives: by kind, split, padding, crop, beams and mode."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache

from mobazoo.errors import InputError, UnsupportedError
from mobazoo.nn import attention as nn_attention
from mobazoo.nn.cache import MobaCache
from tests.models.tiny import FAMILIES, error, ids, ours, padded, stock

RULE = {"layers": ":", "pattern": "moba", "block_size": 4, "top_k": 3}
MODES = {"moba": [{**RULE, "decode": "moba"}, {"layers": 1, "kconv": 3}], "full": [{**RULE, "decode": "full"}]}
KINDS: dict[str, dict[str, Any]] = {"growing": {}, "static": {"max_length": 60}, "offloaded": {"offload": "host"}}
PROMPT, TOTAL = 26, 40
SPLITS = {"one shot": [26, 14], "chunks": [7, 7, 7, 5, 9, 5], "tokens": [1] * 40, "mixed call": [20, 13, 7]}
both = pytest.mark.parametrize("mode", MODES)
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def made(family: str, mode: str, layers: int = 3) -> Any:
    """One model for all tests that change nothing of it."""
    return ours(family, MODES[mode], num_hidden_layers=layers)


def text(mode: str, side: str | None) -> tuple[Tensor, Tensor | None]:
    """Two rows of 40 tokens, the second with 9 slots of padding before it."""
    tokens = ids(2, TOTAL, seed=len(mode))
    if side is None:
        return tokens, None
    return padded(tokens, [TOTAL, TOTAL - 9], side)


def truth(model: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
    with torch.no_grad():
        return model(tokens, attention_mask=mask, decode_from=PROMPT, use_cache=False).logits


def through(model: Any, tokens: Tensor, mask: Tensor | None, kept: Any, sizes: list[int]) -> Tensor:
    """Logits of ``tokens`` given to a cache in parts."""
    got, past = [], kept.get_seq_length()
    for new in sizes:
        seen = None if mask is None else mask[:, : past + new]
        with torch.no_grad():
            part = tokens[:, past : past + new]
            out = model(part, attention_mask=seen, past_key_values=kept, decode_from=PROMPT)
        got.append(out.logits)
        past += new
    return torch.cat(got, 1)


@every_family
@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("side", [None, "left"])
def test_every_split_gives_the_same(family: str, mode: str, kind: str, split: str, side: str | None) -> None:
    model = made(family, mode)
    tokens, mask = text(mode, side)
    want = truth(model, tokens, mask)
    got = through(model, tokens, mask, MobaCache(model.config, **KINDS[kind]), SPLITS[split])
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    assert error(got[real], want[real]) <= 1e-5


@both
def test_the_modes_differ_where_they_should(mode: str) -> None:
    model, other = ours("llama", MODES["full"]), ours("llama", [RULE, {"layers": ":", "decode": "moba"}])
    tokens, _ = text(mode, None)
    a, b = truth(model, tokens, None), truth(other, tokens, None)
    assert error(a[:, :PROMPT], b[:, :PROMPT]) <= 1e-6
    assert error(a[:, PROMPT:], b[:, PROMPT:]) > 1e-2


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_any_split(data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from(sorted(MODES)))
    model = made("qwen3", mode)
    tokens, mask = text(mode, data.draw(st.sampled_from([None, "left"])))
    sizes, left = [], TOTAL
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    kept = MobaCache(model.config, max_length=data.draw(st.sampled_from([None, TOTAL, 64])))
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    got = through(model, tokens, mask, kept, sizes)
    assert error(got[real], truth(model, tokens, mask)[real]) <= 1e-5


@every_family
@both
@pytest.mark.parametrize("kind", KINDS)
def test_crop_and_go_on(family: str, mode: str, kind: str) -> None:
    model = made(family, mode)
    tokens, mask = text(mode, "left")
    kept = MobaCache(model.config, **KINDS[kind])
    wrong = torch.cat([tokens[:, :24], ids(2, 12, seed=5)], 1)
    through(model, wrong, mask, kept, [30, 1, 1, 4])
    kept.crop(-5)
    kept.crop(-7)
    got = through(model, tokens, mask, kept, [3, 8, 5])
    assert error(got, truth(model, tokens, mask)[:, 24:]) <= 1e-5


@both
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_change_places(mode: str, kind: str) -> None:
    model = made("llama", mode)
    tokens, mask = text(mode, "left")
    kept = MobaCache(model.config, **KINDS[kind])
    through(model, tokens, mask, kept, [30])
    for index in ([1, 0], [1, 1, 0]):
        kept.reorder_cache(torch.tensor(index))
        tokens, mask = tokens[index], mask[index] if mask is not None else None
    got = through(model, tokens, mask, kept, [1, 6, 3])
    assert error(got, truth(model, tokens, mask)[:, 30:]) <= 1e-5


@both
@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_knows_the_padding(mode: str, kind: str) -> None:
    """After the prompt no mask is needed."""
    model = made("qwen2", mode)
    tokens, mask = text(mode, "left")
    kept = MobaCache(model.config, **KINDS[kind])
    through(model, tokens, mask, kept, [30])
    got = through(model, tokens, None, kept, [1, 6, 3])
    assert error(got, truth(model, tokens, mask)[:, 30:]) <= 1e-5


@both
def test_packed_documents_equal_documents_through_a_cache(mode: str) -> None:
    model = made("qwen3", mode)
    tokens, lengths = ids(1, TOTAL), [19, 3, 18]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    got = model(tokens, position_ids=position_ids).logits.split(lengths, dim=1)
    for document, logits in zip(tokens.split(lengths, dim=1), got, strict=True):
        kept = MobaCache(model.config)
        alone = [model(tokens, past_key_values=kept).logits for tokens in document.split(2, dim=1)]
        assert error(torch.cat(alone, 1), logits) <= 1e-5


def test_a_prompt_in_chunks_never_stands_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = ours("llama", MODES["moba"]), []
    forward = type(model.model).forward

    def noted(self: Any, input_ids: Tensor, *args: Any, **options: Any) -> Any:
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, *args, **options)

    monkeypatch.setattr(type(model.model), "forward", noted)
    model.generate(ids(1, 26), max_new_tokens=3, prefill_chunk=8)
    assert lengths == [8, 8, 8, 2, 1, 1]


@both
def test_alone_or_in_a_batch(mode: str) -> None:
    """Rows of very different lengths: ten blocks, an odd number of tokens, less than a block, one token."""
    model, lengths = made("llama", mode), [TOTAL, 31, 3, 1]
    tokens, mask = padded(ids(4, TOTAL), lengths, "left")
    options: Any = {"do_sample": False, "max_new_tokens": 9}
    together = model.generate(tokens, attention_mask=mask, **options)
    for row, length in enumerate(lengths):
        alone = model.generate(tokens[row : row + 1, TOTAL - length :], **options)
        assert torch.equal(together[row : row + 1, TOTAL:], alone[:, length:])


@pytest.mark.parametrize(
    "options",
    [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"}, {"num_beams": 4, "num_beam_groups": 2}],
    ids=["contrastive search", "DoLa", "groups of beams"],
)
def test_modes_that_transformers_has_given_up(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
        made("llama", "moba").generate(ids(1, 5), max_new_tokens=2, do_sample=False, **options)


GENERATE: dict[str, dict[str, Any]] = {
    "growing": {},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "dynamic, chunks": {"cache_implementation": "dynamic", "prefill_chunk": 5},
    "static, chunks of one": {"cache_implementation": "static", "prefill_chunk": 1},
    "mapped": {"offload": "folder", "prefill_chunk_size": 11},
    "beams": {"num_beams": 3},
    "beams, static": {"num_beams": 3, "cache_implementation": "static"},
    "beams, chunks": {"num_beams": 2, "prefill_chunk": 7},
    "several": {"num_beams": 2, "num_return_sequences": 2},
}


@both
@pytest.mark.parametrize("how", GENERATE)
def test_generate_equals_generation_without_a_cache(mode: str, how: str, tmp_path: Path) -> None:
    model = made("qwen3", mode)
    tokens, mask = text(mode, "left")
    options = dict(GENERATE[how])
    if "offload" in options:
        options["offload"] = tmp_path
    ways = {name: value for name, value in options.items() if name.startswith("num_")}
    plain: Any = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 9}
    want = model.generate(tokens, **plain, **ways, use_cache=False)
    assert torch.equal(model.generate(tokens, **plain, **options), want)


@both
@pytest.mark.parametrize("helper", ["own", "stock", "lookup"])
def test_assisted_generation_changes_no_token(mode: str, helper: str) -> None:
    model = ours("llama", MODES[mode], eos_token_id=1)
    tokens = ids(1, 12).repeat(1, 3)
    options: Any = {"do_sample": False, "max_new_tokens": 12}
    want = model.generate(tokens, **options, use_cache=False)
    if helper == "lookup":
        options["prompt_lookup_num_tokens"] = 4
    else:
        options["assistant_model"] = ours("llama", MODES[mode], seed=0, num_hidden_layers=3, eos_token_id=1)
        if helper == "stock":
            options["assistant_model"] = stock("llama", "eager")
    got = model.generate(tokens, **options)
    assert torch.equal(got, want[:, : got.shape[1]])
    assert got.shape == want.shape


@both
def test_sampling_draws_from_the_same_distribution(mode: str) -> None:
    model = made("llama", mode)
    drawn = []
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static", "prefill_chunk": 9}):
        torch.manual_seed(3)
        drawn.append(model.generate(ids(2, 20), do_sample=True, max_new_tokens=10, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@both
def test_transformers_caches_still_work(mode: str, kind: Any) -> None:
    rules = [{**MODES[mode][0]}]
    model = ours("llama", rules)
    tokens, mask = text(mode, "left")
    options = {"max_cache_len": 60} if kind is StaticCache else {}
    kept = kind(config=model.config, **options)
    real = mask.bool() if mask is not None else ...
    got = through(model, tokens, mask, kept, [26, 1, 13])
    assert error(got[real], truth(model, tokens, mask)[real]) <= 1e-5


def test_generate_leaves_the_prompts_end_in_the_cache() -> None:
    model = ours("llama", MODES["moba"])
    out = model.generate(ids(1, 13), max_new_tokens=4, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, MobaCache)
    assert out.past_key_values.decode_from == 13
    kept = MobaCache(model.config, max_length=40)
    model.generate(ids(1, 13), max_new_tokens=4, past_key_values=kept)
    assert kept.decode_from == 13


def test_static_caches_of_later_calls_have_the_same_length() -> None:
    model = ours("llama", MODES["moba"])
    options: Any = {"cache_implementation": "static", "return_dict_in_generate": True}
    known = hasattr(GenerationConfig(), "max_cache_len")  # not in the oldest transformers
    lengths = [
        model.generate(ids(1, n), max_new_tokens=4, **options, **more).past_key_values.max_length
        for n, more in ((13, {}), (9, {}), (20, {"max_cache_len": 50} if known else {}), (6, {}))
    ]
    assert lengths == ([16, 16, 50, 50] if known else [16, 16, 23, 23])


@both
def test_decoding_reads_chosen_blocks_only(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse decoding asks for routes and attends with them; full decoding makes none."""
    model = ours("llama", [{**RULE, "decode": mode}])
    kept = MobaCache(model.config)
    through(model, ids(1, 40), None, kept, [30])
    attend, patterns = nn_attention.attend, []

    def noted(*args: Any, **options: Any) -> Tensor:
        patterns.append((type(options["pattern"]).__name__, options["routes"] is not None))
        return attend(*args, **options)

    monkeypatch.setattr(nn_attention, "attend", noted)
    through(model, ids(1, 40), None, kept, [1, 1])
    assert set(patterns) == {("MoBA", True) if mode == "moba" else ("Full", False)}


@pytest.mark.parametrize("kind", ["offloaded_static", "quantized", "sliding_window", "hybrid", "paged"])
def test_other_caches_are_refused_by_name(kind: str) -> None:
    model = ours("llama", MODES["moba"])
    message = f"cache_implementation='{kind}': zoo models know dynamic, static, offloaded; take one of them"
    with pytest.raises(UnsupportedError, match=message):
        model.generate(ids(1, 5), max_new_tokens=2, cache_implementation=kind)
    with pytest.raises(UnsupportedError, match=message):
        model.generate(ids(1, 5), generation_config=GenerationConfig(cache_implementation=kind, max_new_tokens=2))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prefill_chunk": 0}, "prefill_chunk: want at least 1 token, got 0"),
        ({"prefill_chunk_size": -3}, "prefill_chunk: want at least 1 token, got -3"),
        ({"generation_config": GenerationConfig(prefill_chunk_size=0)}, "prefill_chunk: want at least 1 token, got 0"),
        ({"offload": "host", "use_cache": False}, "offload: says where generate makes its cache"),
        ({"offload": "/no/such/folder"}, "offload: want 'host' or a folder for mapped files, got '/no/such/folder'"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made("llama", "moba").generate(ids(1, 5), max_new_tokens=2, **options)


def test_a_model_that_assists_itself_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="assistant_early_exit: rules count a whole model's layers; pass"):
        made("llama", "moba").generate(ids(1, 5), max_new_tokens=2, assistant_early_exit=1)


@pytest.mark.parametrize("padding", [0, 6])
def test_one_graph_for_all_steps(padding: int) -> None:
    """A static cache's step is compiled once, padded or not, and gives what generation gives."""
    model, graphs = made("llama", "moba", layers=2), []
    tokens, mask = padded(ids(2, 20), [20, 20 - padding], "left")
    kept = MobaCache(model.config, max_length=40)
    out = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=9)
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=kept, decode_from=20)

        def count(graph: Any, _: Any) -> Any:
            graphs.append(graph)
            return graph

        step = torch.compile(model, fullgraph=True, backend=count)
        for t in range(20, 28):
            logits = step(out[:, t : t + 1], past_key_values=kept).logits
            assert torch.equal(logits[:, -1].argmax(-1), out[:, t + 1])
    assert len(graphs) == 1
    assert kept.get_seq_length() == 28
    want = model(torch.cat([out[:, 28:29], out[:, 28:29]], 1), past_key_values=kept).logits
    assert want.isfinite().all()


def test_a_last_chunk_of_one_token_is_prompt_in_a_graph_too() -> None:
    model = made("llama", "full", layers=2)
    tokens, mask = text("full", "left")
    want = truth(model, tokens, mask)[:, PROMPT - 1]
    kept = MobaCache(model.config, max_length=60)
    through(model, tokens, mask, kept, [PROMPT - 1])
    step = torch.compile(model, fullgraph=True, backend="eager")
    last: Any = {"attention_mask": mask[:, :PROMPT], "decode_from": PROMPT}  # type: ignore[index]
    with torch.no_grad():
        got = step(tokens[:, PROMPT - 1 : PROMPT], past_key_values=kept, **last).logits
    assert error(got[:, 0], want) <= 1e-5


@both
@pytest.mark.parametrize("chunk", [None, 5, 26])
def test_compiled_steps_of_generate(mode: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where transformers compiles a static cache's steps by itself: the prompt is read outside."""
    torch._dynamo.reset()
    model = made("llama", mode, layers=2)
    tokens, mask = text(mode, "left")
    options: Any = {"attention_mask": mask[:, :26], "do_sample": False, "max_new_tokens": 9}  # type: ignore[index]
    want = model.generate(tokens[:, :26], **options, use_cache=False)
    how = CompileConfig(backend="eager", fullgraph=True)
    monkeypatch.setattr(how, "_compile_all_devices", True, raising=False)
    options |= {"cache_implementation": "static", "compile_config": how, "prefill_chunk": chunk}
    assert torch.equal(model.generate(tokens[:, :26], **options), want)
