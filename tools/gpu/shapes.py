"""The shapes of the GPU report: problems of the papers, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mobazoo.attention import MoBA, Routes, Segments
from mobazoo.attention.blocks import centroids_by
from mobazoo.attention.routing import route_by

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """One problem, random and in one document a row."""

    batch: int
    query_heads: int
    key_heads: int
    length: int
    block_size: int
    top_k: int
    backward: bool
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def pattern(self) -> MoBA:
        """What is computed."""
        return MoBA(self.block_size, self.top_k)

    @property
    def window(self) -> int:
        """Up to so many tokens a document is read whole."""
        return self.block_size * self.top_k

    def small(self, windows: int = 3) -> Shape:
        """For a dry run: the same heads' ratio and as many windows, up to ``windows``, for the interpreter."""
        heads, window = self.query_heads // self.key_heads, 32
        length = min(windows * window, max(16, self.length * window // self.window))
        return replace(self, batch=1, query_heads=heads, key_heads=1, length=length, block_size=16, top_k=2, dim=16)

    def counted(self) -> dict[str, float]:
        """Operations and bytes of the attention by blocks, forward (docs/kernels.md), and of full attention."""
        queries = self.batch * self.query_heads * self.length
        reads = queries * (self.top_k - 1)
        return {
            "reads": reads,
            "read_bytes": 3 * reads * self.dim * self.dtype.itemsize,
            "operations": 4 * self.dim * (self.top_k - 0.5) * self.block_size * queries,
            "full_operations": 2 * self.dim * self.length * queries,
            "gate_operations": self.dim * self.length // self.block_size * queries,
        }

    def spoken(self) -> str:
        """In a line."""
        way = "forward + backward" if self.backward else "forward"
        heads = f"{self.query_heads}/{self.key_heads} heads, D {self.dim}"
        pattern = f"block {self.block_size}, top {self.top_k}"
        return f"{way}, B {self.batch}, {heads}, {self.length} tokens, {pattern}, {str(self.dtype)[6:]}"


SHAPES = {
    "64k": Shape(2, 16, 16, 1 << 16, 128, 8, backward=True),
    "512k": Shape(2, 16, 16, 1 << 19, 128, 8, backward=True),
    "1m": Shape(1, 32, 8, 1 << 20, 4096, 12, backward=False),
}


def inputs(shape: Shape, device: str, alike: int = 1) -> list[Tensor]:
    """q, k, v and the output gradient (empty without a backward); ``alike`` queries in a row are the same."""
    torch.manual_seed(0)
    heads = (shape.query_heads, shape.key_heads, shape.key_heads)
    sizes = [(shape.batch, h, shape.length, shape.dim) for h in heads]
    q, k, v = (torch.randn(s, device=device, dtype=shape.dtype) for s in sizes)
    if alike > 1:
        q = q[:, :, ::alike].repeat_interleave(alike, 2)[:, :, : shape.length]
    q, k, v = (x.requires_grad_(shape.backward) for x in (q, k, v))
    return [q, k, v, torch.randn_like(q, requires_grad=False) if shape.backward else torch.empty(0)]


def step(run: Run, tensors: list[Tensor], *, backward: bool) -> Callable[[], None]:
    """One call, with its backward where there is one."""
    *qkv, dout = tensors

    def work() -> None:
        out = run(*qkv)
        if backward:
            torch.autograd.grad(out, qkv, dout)

    return work


def gate(q: Tensor, k: Tensor, pattern: MoBA, by: str = "torch") -> Routes:
    """Centroids and choice, as ``attend`` makes them."""
    segments = Segments.single(q.shape[0], q.shape[2], q.device)
    return route_by(by, q.detach(), centroids_by(by, k.detach(), pattern.block_size, segments), pattern, segments)
