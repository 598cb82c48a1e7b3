"""MoBA attention in one page: the seam, what a head reads, and what it saves. `python examples/attention.py`."""

import argparse
import time

import torch

from mobazoo.attention import MoBA, Segments, attend, centroids, route

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument(
    "--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768], help="rows to time, in tokens"
)
args = parser.parse_args()
torch.manual_seed(0)


def draw(heads: int, length: int) -> torch.Tensor:
    return torch.randn(1, heads, length, 64)


# 1. One call. Four query heads share two key heads; a query reads its own block and the two best earlier ones.
pattern = MoBA(block_size=64, top_k=3)
q, k, v = draw(4, 1024), draw(2, 1024), draw(2, 1024)
out = attend(q, k, v, pattern=pattern)
exact = attend(q, k, v, pattern=pattern, backend="reference")
print(f"attend: {list(out.shape)}, largest difference from the reference backend {(out - exact).abs().max():.1e}")

# 2. Two documents packed in a row never see each other: the first one's output is what it would be alone.
packed = Segments.from_lengths([[600, 424]])
alone = attend(q[:, :, :600], k[:, :, :600], v[:, :, :600], pattern=pattern)
together = attend(q, k, v, pattern=pattern, segments=packed)[:, :, :600]
print(f"packed: largest difference from the document alone {(together - alone).abs().max():.1e}")

# 3. What one head reads: a line for the last query of each block; O its own block, # chosen, . left out.
routes = route(q, centroids(k, pattern.block_size, packed), pattern, packed)
starts = (packed.pos[0] % pattern.block_size == 0).nonzero().flatten().tolist()
print("blocks read by head 0 (documents of 600 and 424 tokens, each with its own grid of blocks):")
for own, end in zip(starts, [*starts[1:], 1024], strict=True):
    chosen = routes.start[0, [n for n in routes.index[0, 0, end - 1].tolist() if n >= 0]].tolist()
    print("  " + "".join("O" if s == own else "#" if s in chosen else "." for s in starts if s <= own))

# 4. What it saves: block 512, top 3, forward, full attention against MoBA on this machine's CPU.
for length in args.lengths:
    q, k, v = draw(4, length), draw(2, length), draw(2, length)
    repeated = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    begin = time.perf_counter()
    torch.nn.functional.scaled_dot_product_attention(q, *repeated, is_causal=True)
    middle = time.perf_counter()
    attend(q, k, v, pattern=MoBA(block_size=512, top_k=3))
    full, moba = middle - begin, time.perf_counter() - middle
    print(f"{length:6d} tokens: full {1e3 * full:7.1f} ms, MoBA {1e3 * moba:6.1f} ms, {full / moba:.1f} times faster")
