"""Counts operations and bytes of the GPU targets and the least time they can take; needs no GPU.

    python -m tools.gpu.count

Floors are the larger of operations by the peak rate and bytes by the peak bandwidth, part by part; nothing is measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from mobazoo.attention.kernels.triton_slabs import cut, token_bytes
from tools.gpu.shapes import SHAPES, Shape


@dataclass(frozen=True)
class Peak:
    """A second of a GPU (SXM) by its data sheet: 16-bit tensor operations, bytes, integer operations.

    132 multiprocessors do 64 integer operations a clock at 1.98 GHz.
    """

    tensor: float = 989e12
    bandwidth: float = 4.8e12
    integer: float = 132 * 64 * 1.98e9


H200 = Peak()
PEAKS = {"H200": H200, "H100": Peak(bandwidth=3.35e12)}

TILE_ROWS, TILE_BLOCKS = 64, 64  # of the gate, up to 256 bytes a row
# Integer operations on each score: to an ordered integer, inside the query's range, the tile's maximum.
EVERY = 3 + 3 + 1
# On each score again when a tile's rows take one more key: which block it is, hide it, the next maximum.
ROUND = 3 + 2 + 1
# One exchange of two 64-bit keys, by key: compare 2, select 2, and fetch the other from a neighbour, 2.
EXCHANGE = 6
_SORT_BYTES = 4 * 2 * 12 + 24  # a read in torch's radix sort: four passes over key and number, and what is around it


@dataclass(frozen=True)
class Part:
    """A pass over a problem."""

    name: str
    tensor: float = 0.0
    integer: float = 0.0
    bytes: float = 0.0

    def costs(self, peak: Peak) -> dict[str, float]:
        """Seconds by kind of work."""
        work = {"tensor": self.tensor / peak.tensor, "integer": self.integer / peak.integer}
        return work | {"memory": self.bytes / peak.bandwidth}

    def seconds(self, peak: Peak = H200) -> float:
        """The least it can take: its kinds of work overlap."""
        return max(self.costs(peak).values())

    def bound(self, peak: Peak = H200) -> str:
        """What takes that long."""
        costs = self.costs(peak)
        return max(costs, key=lambda name: costs[name])


def rounds(blocks: int, reads: int, programs: int = 4) -> list[float]:
    """Keys taken one after another in each tile of blocks, most over its rows, where scores are independent.

    From the most recent tile on: many at first, few later. Averages over ``programs`` tiles of queries.
    """
    dice = torch.Generator().manual_seed(0)
    scores = torch.rand(programs, TILE_ROWS, blocks, generator=dice)
    kept = torch.full((programs, TILE_ROWS, reads), -1.0)
    found = []
    for n in range(0, blocks, TILE_BLOCKS):
        tile = scores[..., n : n + TILE_BLOCKS]
        both = torch.cat([kept, tile], -1).topk(reads)
        taken = (both.indices >= reads).sum(-1)
        found.append(float(taken.amax(1).float().mean()))
        kept = both.values
    return found


def selections(blocks: int, reads: int) -> dict[str, float]:
    """Integer operations a score of three ways to keep the best ``reads`` of ``blocks``."""
    width = max(2, 1 << (reads - 1).bit_length())
    steps = width.bit_length() - 1
    # Runs of `width` are sorted, then halves are merged: each halving takes the larger ones and sorts them again.
    bitonic = steps * (steps + 1) / 2 + (1 + steps) + (1 + steps) * width / TILE_BLOCKS
    taken = rounds(blocks, reads)
    return {
        "sorted by `tl.topk` in every tile": EVERY - 1 + 2 + EXCHANGE * bitonic,
        "`top_k - 1` maxima of every tile": EVERY + ROUND * reads,
        "maxima while one enters (ours)": EVERY + ROUND * sum(taken) / len(taken),
    }


def parts(shape: Shape) -> list[Part]:
    """What the kernels do, in their order; means and scores, lists, forward, backward."""
    size, dim, block, reads = shape.dtype.itemsize, shape.dim, shape.block_size, shape.top_k - 1
    rows = shape.batch * shape.query_heads * shape.length
    keys = shape.batch * shape.key_heads * shape.length
    blocks = shape.length // block
    scores = rows * blocks / 2
    row = dim * size
    a_score = selections(max(1, min(blocks, 4096)), reads)["maxima while one enters (ours)"]
    found = [
        Part("centroids", bytes=keys * row * (1 + 1 / block)),
        Part("gate", 2 * dim * scores, a_score * scores, rows * (row + 2 * reads)),
        Part("lists", bytes=rows * reads * _SORT_BYTES),
        Part("forward, routed", 4 * dim * block * rows * reads, bytes=rows * reads * (2 * row + 4) + 2 * keys * row),
        Part("forward, own", 2 * dim * block * rows, bytes=rows * (2 * row + reads * (row + 4)) + 2 * keys * row),
    ]
    if shape.backward:
        found += [
            Part("lists again", bytes=rows * reads * _SORT_BYTES),
            Part("backward, delta", bytes=2 * rows * row),
            Part("dq, routed", 6 * dim * block * rows * reads, bytes=rows * reads * 3 * row + 2 * keys * row),
            Part("dq, own", 3 * dim * block * rows, bytes=rows * (3 + reads) * row + 2 * keys * row),
            Part("dk and dv", 8 * dim * block * rows * (reads + 0.5), bytes=(rows * (reads + 1) * 2 + 4 * keys) * row),
        ]
    return found


def full(shape: Shape) -> Part:
    """Full attention that keeps nothing but its output; five products in the backward."""
    products = 7 if shape.backward else 2
    rows = shape.batch * shape.query_heads * shape.length
    return Part("full attention", products * shape.dim * shape.length * rows)


def memory(shape: Shape) -> tuple[float, float]:
    """Bytes at the most beside q, k and v: by blocks, and by full attention (output, gradients, dq in float32)."""
    rows = shape.batch * shape.query_heads * shape.length
    keys = shape.batch * shape.key_heads * shape.length
    row, reads = shape.dim * shape.dtype.itemsize, shape.top_k - 1
    out = rows * (row + 4)
    index = rows * reads * 2
    group, pairs = shape.query_heads // shape.key_heads, shape.batch * shape.key_heads
    per_token = token_bytes(group, reads, row)
    together, tokens = cut(pairs, shape.length, per_token, shape.block_size)
    slab = together * tokens * per_token
    if not shape.backward:
        return out + index + slab, out
    pair = shape.length * shape.query_heads // shape.key_heads * reads * 48  # lists of one pair, while sorted
    grads = rows * row + 2 * keys * row
    saved = out + rows * (row + 4) + grads  # with the output's gradient and delta
    return saved + index + slab + pair, saved + 4 * shape.dim * rows


def page() -> str:
    """The counts in Markdown."""
    lines = []
    for name, shape in SHAPES.items():
        way = "forward + backward" if shape.backward else "forward"
        lines += [
            f"**{name}**: B {shape.batch}, {shape.query_heads}/{shape.key_heads} heads, D {shape.dim}, "
            f"block {shape.block_size}, top {shape.top_k}, {way}.",
            "",
            "| pass | tensor TFLOP | integer Tops | GB | floor ms | bound by |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        found = parts(shape)
        for part in found:
            lines.append(
                f"| {part.name} | {part.tensor / 1e12:.2f} | {part.integer / 1e12:.2f} | {part.bytes / 1e9:.1f} | "
                f"{1e3 * part.seconds():.2f} | {part.bound()} |"
            )
        whole, dense = sum(part.seconds() for part in found), full(shape)
        ours, theirs = (x / 2**30 for x in memory(shape))
        lines += [
            f"| all | {sum(p.tensor for p in found) / 1e12:.2f} | {sum(p.integer for p in found) / 1e12:.2f} | "
            f"{sum(p.bytes for p in found) / 1e9:.1f} | {1e3 * whole:.2f} | |",
            "",
            f"Full attention: {dense.tensor / 1e12:.0f} TFLOP, floor {1e3 * dense.seconds():.0f} ms, "
            f"{dense.seconds() / whole:.1f} times ours. Memory beside q, k, v: {ours:.1f} GiB at the most, "
            f"full {theirs:.1f} GiB, {ours / theirs:.2f} times that.",
            "",
        ]
    lines += ["Integer operations a score to choose, independent scores:", "", "| blocks, reads | " + " | ".join(
        selections(64, 7)) + " |", "| --- | --- | --- | --- |"]  # fmt: skip
    for blocks, reads in ((512, 7), (4096, 7), (256, 11), (4096, 63)):
        cells = " | ".join(f"{value:.0f}" for value in selections(blocks, reads).values())
        lines.append(f"| {blocks}, {reads} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
