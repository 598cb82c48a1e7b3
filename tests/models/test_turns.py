"""A cache that lives longer than one call of ``generate``: a second turn, and calls that it cannot serve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from mobazoo.errors import InputError
from mobazoo.nn.cache import MobaCache
from tests.models.test_generation import KINDS, both, made
from tests.models.tiny import ids, padded

# Earlier releases cut the mask as if the cache were empty, which the model refuses.
IN_CHUNKS: dict[str, Any] = {} if transformers.__version__ < "5.23" else {"prefill_chunk": 3}


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, IN_CHUNKS, {"new_only": True}], ids=["whole", "chunks", "new only"])
def test_a_second_turn_on_a_full_cache(mode: str, kind: str, options: dict[str, Any]) -> None:
    """The reply was decoded, the next question is prompt, its answer is decoded."""
    model, kept = made("qwen3", mode), MobaCache(made("qwen3", mode).config, **KINDS[kind])
    tokens, mask = (x[:, :26] for x in padded(ids(2, 26), [26, 17], "left"))
    plain: Any = {"do_sample": False, "past_key_values": kept}
    first = model.generate(tokens, attention_mask=mask, max_new_tokens=9, **plain)
    every = torch.cat([first, ids(2, 11, seed=9)], 1)
    mask = torch.cat([mask, torch.ones(2, 20, dtype=torch.long)], 1)
    options = dict(options)
    given = every[:, kept.get_seq_length() :] if options.pop("new_only", False) else every
    got = model.generate(given, attention_mask=mask, max_new_tokens=6, **plain, **options)[:, -6:]
    assert kept.decode_from == every.shape[1]
    by_hand, seen = MobaCache(model.config), []
    with torch.no_grad():
        model(every[:, :34], attention_mask=mask[:, :34], past_key_values=by_hand, decode_from=26)
        token = every[:, 34:]
        for _ in range(6):
            token = model(token, past_key_values=by_hand, decode_from=46).logits[:, -1:].argmax(-1)
            seen.append(token)
    assert torch.equal(got, torch.cat(seen, 1))


@pytest.mark.parametrize(
    "slots, prompt, options, message",
    [
        (30, 26, {"max_new_tokens": 9}, "take 34 slots, the static cache has 30; make it longer or max_new_tokens"),
        (40, 26, {"max_new_tokens": 2, "batch": 3}, "holds 1 rows, the input has 3"),
        (
            40,
            12,
            {"max_new_tokens": 2},
            "holds 12 tokens, the prompt and its mask end at 12; pass all tokens",
        ),
        (40, 26, {"max_new_tokens": 2, "prefill_chunk": 0}, "prefill_chunk: want at least 1 token, got 0"),
    ],
)
def test_a_bad_generation_leaves_the_cache_as_it_was(
    slots: int, prompt: int, options: dict[str, Any], message: str
) -> None:
    model, options = made("llama", "moba"), dict(options)
    kept = MobaCache(model.config, max_length=slots)
    with torch.no_grad():
        model(ids(1, 12), past_key_values=kept, decode_from=10)
    with pytest.raises(InputError, match=message):
        model.generate(ids(options.pop("batch", 1), prompt), do_sample=False, past_key_values=kept, **options)
    assert (kept.get_seq_length(), kept.decode_from) == (12, 10)
