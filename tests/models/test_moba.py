"""Zoo models with MoBA layers: the laws that need no second implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

from mobazoo.attention import Full, MoBA
from tests.models.tiny import FAMILIES, MOBA, error, ids, ours, padded

SPARSE = [{"layers": ":", "pattern": "moba", "block_size": 4, "top_k": 3, "decode": "moba"}]
DENSE = [{**SPARSE[0], "decode": "full"}]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_that_cover_everything_are_full_attention(family: str) -> None:
    tokens = ids(2, 40)
    want = ours(family)(tokens).logits
    for block_size, top_k in ((8, 5), (40, 1), (7, 6)):
        rules = [{"pattern": "moba", "block_size": block_size, "top_k": top_k}]
        assert error(ours(family, rules)(tokens).logits, want) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_moba_differs_and_changes_no_weight(family: str) -> None:
    tokens = ids(2, 40)
    model = ours(family)
    full, weights = model(tokens).logits, {k: v.clone() for k, v in model.state_dict().items()}
    model.set_attention(MOBA)
    sparse = model(tokens).logits
    assert error(sparse[:, :16], full[:, :16]) <= 1e-5  # the first two blocks read everything before them
    assert error(sparse, full) > 1e-2
    assert model.config.moba == {"attention": MOBA}
    model.set_attention([*MOBA, {"layers": ":", "pattern": "full"}])
    assert torch.equal(model(tokens).logits, full)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_setting_rules_sets_all_of_them() -> None:
    """So that a model can be put back as it was."""
    own = [*MOBA, {"layers": -1, "pattern": "full"}]
    model = ours("llama", own)
    model.set_attention([{"layers": 0, "pattern": "moba", "block_size": 4, "top_k": 1, "decode": "moba"}])
    assert [layer.self_attn.layer.pattern for layer in model.model.layers] == [MoBA(4, 1), Full(), Full()]
    model.set_attention([])
    assert {layer.self_attn.layer.pattern for layer in model.model.layers} == {Full()}
    model.set_attention(own)
    assert model.config.moba == {"attention": own}
    assert tuple(layer.self_attn.layer for layer in model.model.layers) == ours("llama", own).config.attention_layers()


@pytest.mark.parametrize("attn", ["moba", "moba_naive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded(side: str, attn: str) -> None:
    model = ours("llama", MOBA)
    model.set_attn_implementation(attn)
    rows, lengths = ids(3, 40), [40, 29, 8]
    tokens, mask = padded(rows, lengths, side)
    got = model(tokens, attention_mask=mask).logits
    for b, n in enumerate(lengths):
        want = model(rows[b : b + 1, 40 - n :]).logits[0]
        assert error(got[b][mask[b].bool()], want) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate(family: str) -> None:
    model = ours(family, MOBA)
    tokens, lengths = ids(1, 50), [21, 5, 24]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    got = model(tokens, position_ids=position_ids).logits[0].split(lengths)
    for part, logits in zip(tokens[0].split(lengths), got, strict=True):
        assert error(logits, model(part[None]).logits[0]) <= 1e-5


def recomputed(model: Any, sequence: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """Logits of every generated token from one forward without a cache ``[steps, B, V]``."""
    grown = torch.cat([mask, mask.new_ones(mask.shape[0], sequence.shape[1] - mask.shape[1])], 1)
    logits = model(sequence, attention_mask=grown, use_cache=False, decode_from=prompt).logits
    return logits[:, prompt - 1 : -1].transpose(0, 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 5},
        {"prefill_chunk_size": 5, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3, "eos_token_id": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("rules", [SPARSE, DENSE], ids=["decode moba", "decode full"])
def test_generation_equals_recomputation(rules: list[dict[str, Any]], options: dict[str, Any]) -> None:
    model = ours("qwen3", rules)
    batch = 1 if "prompt_lookup_num_tokens" in options else 2
    tokens, mask = padded(ids(batch, 26), [26, 17][:batch], "left")  # 26 = 5 * 5 + 1: the last chunk is one token
    out = model.generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=10,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    want = recomputed(model, out.sequences, mask, 26)
    assert torch.equal(out.sequences[:, 26:], want.argmax(-1).T)
    assert error(torch.stack(out.logits), want) <= 1e-5


def test_decode_modes_differ() -> None:
    sequence, mask = ids(1, 40), torch.ones(1, 20, dtype=torch.long)
    sparse, dense = (recomputed(ours("qwen3", rules), sequence, mask, 20) for rules in (SPARSE, DENSE))
    assert error(sparse[1:], dense[1:]) > 1e-2
    assert error(sparse[0], dense[0]) <= 1e-5  # predicted from the prompt's last token, which is no decoded one


@pytest.mark.parametrize("rules", [SPARSE, DENSE], ids=["decode moba", "decode full"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole conversation", "new tokens only"])
def test_a_second_turn_on_a_full_cache(rules: list[dict[str, Any]], whole: bool) -> None:
    model = ours("llama", rules)
    options: Any = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = model.generate(ids(1, 13), max_new_tokens=6, **options)
    cache = first.past_key_values
    said = torch.cat([first.sequences, ids(1, 9, seed=1)], 1)
    mask = torch.ones_like(said)
    given = said if whole else said[:, cache.get_seq_length() :]
    second = model.generate(given, attention_mask=mask, past_key_values=cache, max_new_tokens=5, **options)
    sequence = torch.cat([said, second.sequences[:, given.shape[1] :]], 1)
    # What the first turn decoded is in the cache as it was decoded.
    keep = first.sequences.shape[1] - 1
    fresh = model(sequence[:, :keep], decode_from=13)
    want = model(sequence[:, keep:], past_key_values=fresh.past_key_values, decode_from=said.shape[1]).logits
    want = want[:, said.shape[1] - 1 - keep : -1].transpose(0, 1)
    assert error(torch.stack(second.logits), want) <= 1e-5


def test_chunks_of_any_size_equal_one_shot() -> None:
    model = ours("llama", MOBA)
    tokens = ids(2, 33)
    want = model(tokens).logits
    for sizes in ([1] * 33, [10, 1, 22], [32, 1]):
        for cache in (None, StaticCache(config=model.config, max_cache_len=40)):
            got, past = [], cache
            for chunk in tokens.split(sizes, dim=1):
                out = model(chunk, past_key_values=past, use_cache=True)
                past = out.past_key_values
                got.append(out.logits)
            assert error(torch.cat(got, 1), want) <= 1e-5


def test_beams_and_sampling_run_on_a_cache() -> None:
    model = ours("llama", SPARSE)
    tokens, mask = padded(ids(2, 20), [20, 9], "left")
    options: Any = {"attention_mask": mask, "num_beams": 3, "do_sample": False, "max_new_tokens": 8}
    assert torch.equal(model.generate(tokens, **options), model.generate(tokens, use_cache=False, **options))
    torch.manual_seed(0)
    assert model.generate(tokens, attention_mask=mask, do_sample=True, max_new_tokens=3).shape == (2, 23)


def test_padding_never_reaches_tokens() -> None:
    model = ours("llama", MOBA)
    tokens, mask = padded(ids(2, 30), [30, 11], "left")
    other = torch.where(mask.bool(), tokens, 5)
    real = mask.bool()
    assert torch.equal(model(tokens, attention_mask=mask).logits[real], model(other, attention_mask=mask).logits[real])
