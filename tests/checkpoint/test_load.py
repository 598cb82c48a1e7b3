"""``load`` gives transformers' model, in the dtype, on the device and with the attention asked for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mobazoo.attention.pattern import Full, MoBA
from mobazoo.checkpoint.load import load
from mobazoo.errors import InputError, UnsupportedError

from .factories import FAMILIES, RULES, edit_config, ids, save


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_equals_transformers(tmp_path: Path, family: str, tied: bool, shards: bool) -> None:
    theirs = save(tmp_path, family, shards, tie_word_embeddings=tied)
    ours = load(tmp_path)
    assert not ours.training
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, rtol=0, atol=1e-5)


def test_a_tied_head_that_is_stored_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(tmp_path, tie_word_embeddings=True)
    held = load_file(tmp_path / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # old Llama checkpoints have it
    save_file(held, tmp_path / "model.safetensors")
    ours = load(tmp_path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_dtype(single: Path) -> None:
    assert load(single).dtype == torch.float32
    for dtype in ("bfloat16", torch.bfloat16):
        ours = load(single, dtype=dtype)
        assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
        assert ours.config.dtype == torch.bfloat16
        assert ours.model.rotary_emb.inv_freq.dtype == torch.float32
    edit_config(single, dtype="float16")
    assert load(single).dtype == torch.float16
    edit_config(single, dtype=None)
    assert load(single).dtype == torch.float32
    with pytest.raises(InputError, match="dtype: want one of float32, bfloat16, float16, got 'int8'"):
        load(single, dtype="int8")


def test_device(single: Path) -> None:
    ours = load(single, device="meta")
    assert all(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))
    with pytest.raises(InputError, match="device: "):
        load(single, device="abacus")


def test_rules_and_shorthands(single: Path) -> None:
    assert all(layer.pattern == Full() for layer in load(single).config.attention_layers())
    ours = load(single, attention=RULES, attn="moba")
    assert [layer.pattern for layer in ours.config.attention_layers()] == [MoBA(4, 2), MoBA(4, 2), Full()]
    ours.save_pretrained(single / "zoo")
    zoo = load(single / "zoo", attn="moba")
    assert zoo.config.attention_layers() == ours.config.attention_layers()
    with torch.no_grad():
        assert torch.equal(zoo(ids()).logits, ours(ids()).logits)
        assert not torch.allclose(zoo(ids()).logits, load(single)(ids()).logits)
        assert torch.equal(load(single / "zoo", attn="full")(ids()).logits, load(single)(ids()).logits)
        naive = load(single / "zoo", attn="moba_naive")
        torch.testing.assert_close(naive(ids()).logits, zoo(ids()).logits, rtol=0, atol=1e-5)
    assert {layer.backend for layer in naive.config.attention_layers()} == {"reference"}
    later = load(single / "zoo", attention=[{"layers": 0, "top_k": 3}])
    assert [layer.pattern for layer in later.config.attention_layers()] == [MoBA(4, 3), MoBA(4, 2), Full()]


@pytest.mark.parametrize(
    ("options", "match", "kind"),
    [
        ({"attn": "moba"}, "no rule gives a layer MoBA; pass attention=", InputError),
        ({"attn": "moba_naive"}, "no rule gives a layer MoBA; pass attention=", InputError),
        ({"attn": "sdpa"}, "attn: want one of moba, moba_naive, full, got 'sdpa'", InputError),
        ({"attention": [{"topk": 3}]}, "unknown key 'topk'; did you mean 'top_k'", InputError),
        ({"attention": [{"pattern": "moba"}]}, "pattern moba needs block_size and top_k", InputError),
        ({"attention": [{"kconv": 3}]}, "3 missing: .*k_conv.*come by `mobazoo convert`", InputError),
        (
            {"attention": [{"backend": "cutlass"}]},
            "layer 0: unknown backend 'cutlass'; known: auto, decode, flash",
            InputError,
        ),
        (
            {"attention": [*RULES, {"backend": "sdpa"}]},
            "layer 0: backend 'sdpa' cannot do this: .*these can",
            UnsupportedError,
        ),
        (
            {"attention": [{"backend": "flex_routed"}]},
            "layer 0: backend 'flex_routed' cannot do this",
            UnsupportedError,
        ),
    ],
)
def test_rules_that_cannot_be(single: Path, options: dict, match: str, kind: type) -> None:
    with pytest.raises(kind, match=match):
        load(single, **options)


def test_sliding_window_is_named(tmp_path: Path) -> None:
    save(tmp_path, "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(UnsupportedError, match=r"layer_types\[1\] is 'sliding_attention'"):
        load(tmp_path)


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3"])
def test_rope_types_and_where_old_configurations_keep_them(tmp_path: Path, rope: str) -> None:
    scaling = {"rope_type": rope, "factor": 4.0}
    if rope != "linear":
        scaling["original_max_position_embeddings"] = 32
    if rope == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = save(tmp_path, rope_parameters={**scaling, "rope_theta": 5000.0})
    with torch.no_grad():
        want = theirs(ids()).logits
        torch.testing.assert_close(load(tmp_path)(ids()).logits, want, rtol=0, atol=1e-5)
        config = json.loads((tmp_path / "config.json").read_text())
        del config["rope_parameters"]
        config |= {"rope_scaling": scaling, "rope_theta": 5000.0}
        (tmp_path / "config.json").write_text(json.dumps(config))
        torch.testing.assert_close(load(tmp_path)(ids()).logits, want, rtol=0, atol=1e-5)


def test_generation_config(single: Path) -> None:
    (single / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true, "eos_token_id": [2, 5]}')
    ours = load(single)
    assert (ours.generation_config.temperature, ours.generation_config.eos_token_id) == (0.25, [2, 5])
    (single / "generation_config.json").write_text('{"max_new_tokens": -3}')
    with pytest.raises(InputError, match=r"generation_config.json: .*max_new_tokens"):
        load(single)


def test_progress(sharded: Path) -> None:
    told: list[tuple[str, int, int]] = []
    load(sharded, progress=lambda *said: told.append(said))
    assert told[-1] == ("load", 117888, 117888)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


PEAK = """
import sys
from pathlib import Path
from mobazoo.checkpoint.load import load
def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
load(sys.argv[1])  # imports, and what the first call allocates
Path("/proc/self/clear_refs").write_text("5")  # the peak starts afresh
before = status("VmRSS")
model = load(sys.argv[2])
print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""


def test_peak_memory_is_the_weights_and_less_than_one_shard(single: Path, tmp_path: Path) -> None:
    from .factories import tiny

    big = tiny(hidden_size=512, intermediate_size=1024, num_hidden_layers=8)
    big.save_pretrained(tmp_path / "big", max_shard_size="24MB")
    largest = max(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    command = [sys.executable, "-c", PEAK, str(single), str(tmp_path / "big")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, weights = map(int, done.stdout.split())
    print(f"peak {peak / 2**20:.1f} MiB, weights {weights / 2**20:.1f}, largest shard {largest / 2**20:.1f}")
    assert weights > 60 << 20
    assert peak < weights + largest
