"""The key convolution: its formula, its zero start, documents and padding, and caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import silu
from transformers import DynamicCache, StaticCache

from mobazoo.attention import Segments
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.nn.cache import MobaCache
from mobazoo.nn.kconv import KeyConv
from tests.models.tiny import MOBA, error, ids, ours, padded

RULES = [{**MOBA[0], "kconv": 3}, {"layers": -1, "pattern": "full", "kconv": 5}]


@pytest.mark.parametrize("width", [3, 5])
def test_it_is_the_sum_over_the_document(width: int) -> None:
    torch.manual_seed(0)
    conv = KeyConv(2, 4, width).double()
    torch.nn.init.normal_(conv.weight)
    segments = Segments.from_lengths([[5, 1, 3], [4]], length=11)
    k = torch.randn(2, 2, 11, 4, dtype=torch.float64)
    want = k.clone()
    for b in range(2):
        for t in range(11):
            taps = range(min(width, int(segments.pos[b, t]) + 1))
            want[b, :, t] += silu(sum(conv.weight[n, :, 0] * k[b, :, t - n] for n in taps))
    real = segments.doc >= 0
    torch.testing.assert_close(conv(k, segments.pos).transpose(1, 2)[real], want.transpose(1, 2)[real])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_zero_start_is_the_identity_and_learns(family: str) -> None:
    plain = ours(family, [{**rule, "kconv": 0} for rule in RULES])
    model = ours(family, RULES)
    extra = set(model.state_dict()) - set(plain.state_dict())
    assert extra == {f"model.layers.{n}.self_attn.k_conv.weight" for n in range(3)}
    with torch.no_grad():
        for name in extra:
            model.get_parameter(name).zero_()
    model.load_state_dict(plain.state_dict(), strict=False)
    tokens = ids(2, 30)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    model(tokens, labels=tokens).loss.backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in extra)


def test_new_models_start_at_zero() -> None:
    config = ours("llama", RULES).config
    model = type(ours("llama"))(config)
    assert not any(p.any() for name, p in model.named_parameters() if "k_conv" in name)


def test_packed_equals_separate() -> None:
    model = ours("llama", RULES)
    tokens, lengths = ids(1, 40), [17, 2, 21]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    got = model(tokens, position_ids=position_ids).logits[0].split(lengths)
    for part, logits in zip(tokens[0].split(lengths), got, strict=True):
        assert error(logits, model(part[None]).logits[0]) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded(side: str) -> None:
    model = ours("qwen2", RULES)
    rows, lengths = ids(2, 24), [24, 11]
    tokens, mask = padded(rows, lengths, side)
    got = model(tokens, attention_mask=mask).logits
    for b, n in enumerate(lengths):
        assert error(got[b][mask[b].bool()], model(rows[b : b + 1, 24 - n :]).logits[0]) <= 1e-5


def test_it_matters_under_full_attention() -> None:
    model, plain = ours("llama", [{"kconv": 3}]), ours("llama")
    plain.load_state_dict(model.state_dict(), strict=False)
    assert error(model(ids(1, 20)).logits, plain(ids(1, 20)).logits) > 1e-2


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_caches_without_raw_keys_are_refused(cache: Any) -> None:
    model = ours("llama", RULES)
    options = {"max_cache_len": 20} if cache is StaticCache else {}
    with pytest.raises(UnsupportedError, match=f"kconv with a {cache.__name__}: only MobaCache keeps the raw keys"):
        model(ids(1, 10), past_key_values=cache(config=model.config, **options))


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {}, {"cache_implementation": "static"}, {"prefill_chunk": 1}, {"prefill_chunk": 4}],
    ids=str,
)
def test_generation(options: dict[str, Any]) -> None:
    model = ours("llama", [{**rule, "decode": "moba"} for rule in RULES])
    tokens, mask = padded(ids(2, 11), [11, 6], "left")
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=9, do_sample=False, **options)
    grown = torch.cat([mask, mask.new_ones(2, 9)], 1)
    want = model(out, attention_mask=grown, use_cache=False).logits[:, 10:-1]
    assert torch.equal(out[:, 11:], want.argmax(-1))


def test_a_crop_goes_back_as_far_as_raw_keys_are_kept() -> None:
    model = ours("llama", RULES)
    tokens = ids(1, 80)
    cache = MobaCache(model.config)
    model(tokens, past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(InputError, match=r"cannot remove 65 tokens: .* keeps the raw keys to go back 64"):
        cache.crop(-65)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    want = model(tokens).logits
    for removed, most in ((60, 64), (4, 4)):
        cache.crop(-removed)
        at = cache.get_seq_length()
        with pytest.raises(InputError, match=f"to go back {most - removed} tokens"):
            cache.crop(-(most - removed + 1))
        if removed == 60:
            got = model(tokens[:, at : at + 10], past_key_values=cache).logits
            assert error(got, want[:, at : at + 10]) <= 1e-5
            cache.crop(-10)
    got = model(tokens[:, 16:], past_key_values=cache).logits
    assert error(got, want[:, 16:]) <= 1e-5


def test_it_comes_and_goes_by_conversion_only() -> None:
    with pytest.raises(UnsupportedError, match="layer 0 has kconv 3, the rules say 0; its weights come by conversion"):
        ours("llama", RULES).set_attention(MOBA)
    with pytest.raises(UnsupportedError, match="layer 0 has kconv 0, the rules say 3"):
        ours("llama", MOBA).set_attention(RULES)
