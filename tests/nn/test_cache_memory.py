"""Peak memory of decoding and of a prompt in chunks, against bounds that a copy of the cache would break."""

from __future__ import annotations

import sys

import pytest

from tests.memory import MIB, OVERHEAD, Peak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sparse_token_copies_no_keys(dtype: str, peak: Peak) -> None:
    """Keys of 256 MiB and as many values: a token may take what it reads and its row numbers, far from a copy."""
    hq, hkv, dim, block, top_k = 8, 2, 64, 512, 8
    size = 4 if dtype == "float32" else 2
    length = (256 * MIB) // (hkv * dim * size)
    code = f"""
from mobazoo.nn.cache_layer import MobaCacheLayer
from mobazoo.nn.rows import Rows
length, pattern, rows = {length}, MoBA({block}, {top_k}), Rows(1)
layer = MobaCacheLayer()

def token(new):
    q, k = torch.randn(1, {hq}, 1, {dim}), torch.zeros(1, {hkv}, new, {dim})
    q, k = q.to(torch.{dtype}), k.to(torch.{dtype})
    keys, values = layer.update(k, k, {block}, rows)
    segments = rows.segments(keys.shape[2], layer.room, k.device)
    routes = route(q, layer.centroids(rows), pattern, segments)
    return attend(q, keys, values, pattern=pattern, routes=routes, segments=segments)

def work():
    return [token(1) for _ in range(4)]

for _ in range(8):
    token(length // 8)
token(1)
"""
    keys = hq * top_k * block  # of all heads
    allowed = keys * (2 * dim * size + 8 * 8) + OVERHEAD  # gathered keys and values, and eight row numbers of each
    assert allowed < 200 * MIB
    assert peak(code) < allowed


def test_a_prompt_in_chunks_takes_the_memory_of_a_chunk(peak: Peak) -> None:
    """32K tokens, feed-forward of 2048: one of its two buffers is 256 MiB at once and 8 MiB for a chunk of 1024."""
    length, hidden, inside, chunk = 32 << 10, 32, 2048, 1024
    code = f"""
from mobazoo.models.llama.model import MobaLlamaConfig, MobaLlamaForCausalLM
config = MobaLlamaConfig(vocab_size=64, hidden_size={hidden}, intermediate_size={inside}, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, max_position_embeddings={2 * length},
    moba={{"attention": [{{"pattern": "moba", "block_size": 256, "top_k": 2}}]}})
model = MobaLlamaForCausalLM(config).eval()
ids = torch.randint(2, 64, (1, {length}))
model.generate(ids[:, :600], max_new_tokens=2, do_sample=False)

def work():
    return model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk={chunk})
"""
    cache = 2 * length * hidden * 4 * (1 + 1.25)  # while it grows, the old one is still there
    tokens = 16 * 8 * length  # ids, mask, positions, documents
    allowed = 4 * chunk * inside * 4 + 16 * chunk * hidden * 4 + cache + tokens + OVERHEAD
    assert allowed < length * inside * 4
    assert peak(code) < allowed
