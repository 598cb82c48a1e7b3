"""The cache by itself: memory, centroids that no split can change, and every change of its rows and length."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobazoo.attention import Segments, centroids
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.explain import centroid_bytes, kv_bytes
from mobazoo.nn.cache import MobaCache
from mobazoo.nn.means import block_means
from mobazoo.nn.rows import Rows
from tests.models.tiny import MOBA, error, ids, ours

RULES = [{**MOBA[0], "decode": "moba"}]
KINDS: dict[str, dict[str, Any]] = {"growing": {}, "static": {"max_length": 80}, "host": {"offload": "host"}}
SIZE = 8
KV = torch.randn(2, 2, 2, 70, 16, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 70, dtype=torch.long)
MASK[1, :11] = 0


def cache(**options: Any) -> MobaCache:
    return MobaCache(ours("llama", RULES).config, **options)


def fill(kept: MobaCache, sizes: list[int], mask: Tensor | None = None, block_size: int = SIZE) -> MobaCache:
    """Writes ``KV`` into the first layer, in parts."""
    past = 0
    for new in sizes:
        rows = Rows(2) if mask is None else Rows.from_mask(mask[:, : past + new])
        kept.begin(rows, past, KV.device)
        kept.update(*KV[:, :, :, past : past + new], 0, block_size)
        past += new
    return kept


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_every_split_makes_the_same_centroids_bit_for_bit(kind: str, data: st.DataObject) -> None:
    sizes, left = [], 70
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    mask = MASK if data.draw(st.booleans()) else None
    got, want = (fill(cache(**KINDS[kind]), split, mask).centroids(0) for split in (sizes, [70]))
    assert torch.equal(got.start, want.start)
    real = want.start >= 0
    assert torch.equal(got.mean.transpose(1, 2)[real], want.mean.transpose(1, 2)[real])
    segments = Segments.single(2, 70) if mask is None else Segments.from_attention_mask(mask)
    there = centroids(KV[0], SIZE, segments)
    torch.testing.assert_close(got.mean.transpose(1, 2)[real], there.mean.transpose(1, 2)[there.start >= 0])
    assert torch.equal(got.start[real], there.start[there.start >= 0])
    assert int(real[1].sum()) == (70 - 11 * (mask is not None)) // SIZE


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 13])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_means_are_means(length: int, dtype: torch.dtype) -> None:
    blocks = torch.randn(2, 3, length, 4).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(block_means(blocks), blocks.to(wide).mean(2).to(dtype))


def test_a_token_never_copies_the_cache() -> None:
    kept, moves, where = cache(), 0, None
    for t in range(400):
        keys, _ = kept.update(*KV[:, :, :, t % 70 : t % 70 + 1], 0)
        moves, where = moves + (keys.data_ptr() != where), keys.data_ptr()
        assert keys.shape[2] == t + 1
    assert moves <= 20
    assert kept.layers[0].room <= 400 * 1.25 + 16


def test_memory_is_keys_values_and_centroids() -> None:
    kept = fill(cache(), [70])
    room = kept.layers[0].room
    assert 70 <= room <= 70 * 1.25 + 16
    assert kept.nbytes() == 4 * 2 * 2 * 16 * (2 * room + room // SIZE + 1)
    static = fill(cache(max_length=80), [70])
    assert static.nbytes() == 4 * 2 * 2 * 16 * (2 * 80 + 80 // SIZE + 1)


def test_a_token_takes_the_bytes_that_show_prints() -> None:
    model = ours("llama", [*RULES, {"layers": 0, "pattern": "full"}, {"layers": 1, "block_size": 4}])
    took = []
    for slots in (40, 80):
        kept = MobaCache(model.config, max_length=slots)
        with torch.no_grad():
            model(ids(1, 20), past_key_values=kept)
        took.append(kept.nbytes())
    sizes: Any = (model.config.num_key_value_heads, model.config.head_dim, torch.float32)
    a_token = kv_bytes(3, *sizes) + centroid_bytes(model.config.attention_layers(), *sizes)
    assert took[1] - took[0] == 40 * a_token


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("cut", [1, 6, 7, 30, 70])
def test_crop_takes_back_tokens_and_centroids(kind: str, mask: Tensor | None, cut: int) -> None:
    kept = fill(cache(**KINDS[kind]), [41, 29], mask)
    kept.crop(0)
    assert kept.get_seq_length() == 70
    kept.crop(-cut)
    want = fill(cache(**KINDS[kind]), [70 - cut], mask) if cut < 70 else None
    assert kept.get_seq_length() == 70 - cut
    if want is not None:
        got, known = kept.centroids(0), want.centroids(0)
        assert torch.equal(got.start, known.start)
        real = known.start >= 0
        assert torch.equal(got.mean.transpose(1, 2)[real], known.mean.transpose(1, 2)[real])
        assert torch.equal(kept.layers[0].keys, want.layers[0].keys)
    other = KV.flip(3)[:, :, :, :cut]
    kept.update(*other, 0, SIZE)
    whole = cache(**KINDS[kind])
    whole.begin(Rows(2) if mask is None else Rows.from_mask(mask), 0, KV.device)
    whole.update(*torch.cat([KV[:, :, :, : 70 - cut], other], 3), 0, SIZE)
    real = whole.centroids(0).start >= 0
    got, known = (x.centroids(0).mean.transpose(1, 2)[real] for x in (kept, whole))
    assert torch.equal(got, known)


def test_a_cut_that_cannot_be_made_changes_nothing() -> None:
    kept = fill(cache(), [70])
    with pytest.raises(InputError, match="cannot remove 71 tokens, the cache holds 70"):
        kept.crop(-71)
    assert torch.equal(kept.layers[0].keys, KV[0])


def test_earlier_transformers_say_what_to_keep() -> None:
    kept = fill(cache(), [70])
    kept.crop(90)
    assert kept.get_seq_length() == 70
    kept.crop(33)
    assert torch.equal(kept.layers[0].keys, KV[0][:, :, :33])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [[1, 0], [1, 1], [1], [0, 1, 1, 0]], ids=str)
def test_rows_are_chosen_with_their_padding(kind: str, index: list[int]) -> None:
    kept = fill(cache(**KINDS[kind]), [60], MASK)
    want = kept.centroids(0)
    want = want.mean.clone()[index], want.start[index]
    kept.reorder_cache(torch.tensor(index))
    assert torch.equal(kept.layers[0].keys, KV[0, index, :, :60])
    assert torch.equal(kept.layers[0].values, KV[1, index, :, :60])
    got = kept.centroids(0)
    assert torch.equal(got.mean, want[0])
    assert torch.equal(got.start, want[1])
    assert kept.rows is not None
    assert kept.rows.begin == tuple((0, 11)[i] for i in index)
    kept.update(*KV[:, index, :, 60:], 0, SIZE)
    whole = fill(cache(), [70], MASK).centroids(0)
    assert torch.equal(kept.centroids(0).mean, whole.mean[index])


def test_repeat_and_select_are_the_same_choice() -> None:
    kept = fill(cache(), [60], MASK)
    kept.batch_repeat_interleave(2)
    assert torch.equal(kept.layers[0].keys, KV[0, [0, 0, 1, 1], :, :60])
    kept.batch_select_indices(torch.tensor([3]))
    assert torch.equal(kept.layers[0].keys, KV[0, [1], :, :60])
    assert kept.rows is not None
    assert (kept.rows.batch, kept.rows.begin) == (1, (11,))


@pytest.mark.parametrize("kind", KINDS)
def test_reset_forgets_tokens_and_keeps_memory(kind: str) -> None:
    kept = fill(cache(**KINDS[kind]), [70], MASK)
    kept.decode_from = 3
    where = kept.layers[0].keys.data_ptr()
    kept.reset()
    assert (kept.get_seq_length(), kept.decode_from, kept.rows) == (0, None, None)
    fill(kept, [70])
    assert kept.layers[0].keys.data_ptr() == where
    kept.crop(-70)
    kept.update(*KV[:, :1, :, :9], 0, SIZE)  # another number of rows, where none are left
    assert torch.equal(kept.layers[0].keys, KV[0, :1, :, :9])
    kept.reset()
    fill(kept, [70])
    assert torch.equal(kept.centroids(0).mean, fill(cache(), [70]).centroids(0).mean)


def test_another_block_size_makes_its_own_centroids() -> None:
    kept = fill(cache(), [50])
    kept.update(*KV[:, :, :, 50:], 0, 5)
    assert torch.equal(kept.centroids(0).mean, fill(cache(), [70], block_size=5).centroids(0).mean)


def test_mapped_files_leave_nothing_behind(tmp_path: Path) -> None:
    kept = fill(cache(offload=tmp_path), [30, 40])
    assert torch.equal(kept.layers[0].keys, KV[0])
    assert list(tmp_path.iterdir()) == []
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert mapped  # keys and values really live in a file
    assert torch.equal(kept.centroids(0).mean, fill(cache(), [70]).centroids(0).mean)
    del kept
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def state(kept: MobaCache) -> list[Any]:
    """Everything a later call can see of it, to the byte."""
    known: list[Any] = [kept.decode_from, kept.get_seq_length(), None if kept.rows is None else kept.rows.begin]
    for layer in kept.layers:
        known += [layer.count, layer.done, layer.block_size, layer._kept, int(layer.length)]
        for tensor in (layer.keys, layer.values, layer._raw):
            known.append(None if tensor is None else tensor.numpy().tobytes())
        blocks = layer.done // layer.block_size if layer.block_size else 0
        known.append(None if layer._mean is None else layer._mean[:, :, :blocks].numpy().tobytes())
    return known


@pytest.mark.parametrize(
    "change, call, message",
    [
        ({"num_key_value_heads": 4}, {}, "holds 2 key heads of dim 16, the model has 4 of 16; it is another model's"),
        ({"head_dim": 8}, {}, "holds 2 key heads of dim 16, the model has 2 of 8; it is another model's cache"),
        ({"num_hidden_layers": 2}, {}, "made for 3 layers, the model has 2; it is another model's cache"),
        ({"kconv": 3}, {}, "layer 1 is made for kconv 0, the model has 3; it is another model's cache"),
        ({}, {"batch": 2}, "holds 1 rows, the input has 2"),
        ({}, {"new": 21}, "20 tokens and 21 new ones do not fit a static cache of 40 slots; make it longer"),
        ({}, {"mask": (0, 1)}, "row 0 begins at slot 1, in the cache at slot 0; pass the mask of all tokens"),
        ({}, {"mask": (1, 0)}, "not contiguous"),
        ({"dtype": torch.float64}, {}, "holds torch.float32, the model has torch.float64"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_bad_calls_leave_the_cache_as_it_was(change: dict[str, Any], call: dict[str, Any], message: str) -> None:
    model = ours("llama", RULES)
    kept = MobaCache(model.config, max_length=40)
    model(ids(1, 20), past_key_values=kept)
    before = state(kept)
    change = dict(change)
    dtype = change.pop("dtype", torch.float32)
    rules = [*RULES, {"layers": 1, "kconv": change.pop("kconv", 0)}]
    other = ours("llama", rules, **change).to(dtype)
    mask = None
    if "mask" in call:
        mask = torch.ones(1, 25, dtype=torch.long)
        mask[:, 0 if call["mask"] == (0, 1) else 10] = 0
    tokens = ids(call.get("batch", 1), call.get("new", 5))
    with pytest.raises(InputError, match=message):
        other(tokens, past_key_values=kept, attention_mask=mask, decode_from=25)
    assert state(kept) == before
    assert error(model(ids(1, 25)[:, 20:], past_key_values=kept).logits, model(ids(1, 25)).logits[:, 20:]) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("past", [0, 20])
@pytest.mark.parametrize("new", [1, 70])
def test_a_call_that_fails_on_its_way_leaves_the_cache_as_it_was(kind: str, past: int, new: int) -> None:
    """The last layer refuses after the others have taken the tokens, more of them than a crop could take back."""
    model, tokens = ours("llama", [*RULES, {"layers": ":", "kconv": 3}]), ids(1, 90)
    kept = MobaCache(model.config, **({"max_length": 90} if kind == "static" else KINDS[kind]))
    if past:
        model(tokens[:, :past], past_key_values=kept)
        before = state(kept)
    model.set_attention([*model.config.moba["attention"], {"layers": -1, "backend": "decode"}])
    with pytest.raises(UnsupportedError, match="decode has no backward"):
        model(tokens[:, past : past + new], past_key_values=kept, decode_from=past)
    if past:
        assert state(kept) == before
    assert (kept.get_seq_length(), kept.decode_from) == (past, None)
    with torch.no_grad():
        got = model(tokens[:, past : past + new], past_key_values=kept).logits
        assert error(got, model(tokens[:, : past + new], use_cache=False).logits[:, past:]) <= 1e-5


def test_inference_mode_may_come_and_go() -> None:
    model, tokens = ours("llama", [*RULES, {"layers": 0, "kconv": 3}]), ids(1, 30)
    kept = None
    for at, inside in ((0, True), (20, False), (25, True)):
        with torch.inference_mode(inside), torch.no_grad():
            out = model(tokens[:, at : at + (20 if at == 0 else 5)], past_key_values=kept, use_cache=True)
        kept = out.past_key_values
    assert error(out.logits.clone(), model(tokens).logits[:, 25:]) <= 1e-5


def test_gradients_flow_through_a_cached_forward() -> None:
    model, tokens = ours("qwen3", RULES), ids(1, 24)
    grads = []
    for options in ({"use_cache": False}, {}):
        model.zero_grad()
        model(tokens, labels=tokens, **options).loss.backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_rows_that_ended_cannot_go_on() -> None:
    model = ours("llama", RULES)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    kept = model(ids(2, 20), attention_mask=mask).past_key_values
    with pytest.raises(InputError, match="a row ends in padding and cannot go on; pad prompts on the left"):
        model(ids(2, 1), past_key_values=kept)
    kept.crop(-5)
    tokens = ids(2, 20)[:, :16]
    want = model(tokens).logits[:, 15:]
    assert error(model(tokens[:, 15:], past_key_values=kept).logits, want) <= 1e-5


@pytest.mark.parametrize(
    "options, message",
    [({"max_length": 0}, "max_length must be at least 1, got 0"), ({"offload": "nowhere"}, "'nowhere', which is no")],
)
def test_caches_that_cannot_be_made(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cache(**options)


def test_what_a_compiled_graph_cannot_do() -> None:
    model = ours("llama", RULES)
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        growing = model(ids(1, 20)).past_key_values
        with pytest.raises(Exception, match="a growing cache inside a compiled graph; use a static one"):
            step(ids(1, 1), past_key_values=growing)
        with pytest.raises(Exception, match="the first tokens of a cache inside a compiled graph; prefill outside"):
            step(ids(1, 4), past_key_values=MobaCache(model.config, max_length=8))
