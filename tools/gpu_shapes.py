"""The shapes of the GPU report, who computes them, and whether the results are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mobazoo.attention import MoBA, Routes, Segments, attend
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

    def small(self) -> Shape:
        """For a dry run: the same heads' ratio and pattern at a size the interpreter takes."""
        heads = self.query_heads // self.key_heads
        return replace(self, batch=1, query_heads=heads, key_heads=1, length=96, block_size=16, top_k=3, dim=16)

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


SHAPES = {
    "64k": Shape(2, 16, 16, 1 << 16, 128, 8, backward=True),
    "512k": Shape(2, 16, 16, 1 << 19, 128, 8, backward=True),
    "1m": Shape(1, 32, 8, 1 << 20, 4096, 12, backward=False),
}


def inputs(shape: Shape, device: str) -> list[Tensor]:
    """q, k, v and the output gradient (None without a backward)."""
    torch.manual_seed(0)
    heads = (shape.query_heads, shape.key_heads, shape.key_heads)
    sizes = [(shape.batch, h, shape.length, shape.dim) for h in heads]
    q, k, v = (torch.randn(s, device=device, dtype=shape.dtype).requires_grad_(shape.backward) for s in sizes)
    return [q, k, v, torch.randn_like(q, requires_grad=False) if shape.backward else torch.empty(0)]


def full(device: str) -> dict[str, Run]:
    """Full attention as others compute it."""
    kernels = {"SDPA": SDPBackend.MATH} if device == "cpu" else {
        "SDPA flash": SDPBackend.FLASH_ATTENTION,
        "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    }  # fmt: skip
    found: dict[str, Run] = {name: _sdpa(kernel) for name, kernel in kernels.items()}
    return found if device == "cpu" else {"FlashAttention-2 (aten)": _aten, **found}


def by_blocks(shape: Shape) -> dict[str, Run]:
    """Attention by blocks, the gate included, by each backend that is compared."""
    return {name: _backend(name, shape.pattern) for name in ("triton", "flash")}


def _backend(name: str, pattern: MoBA) -> Run:
    return lambda q, k, v: attend(q, k, v, pattern=pattern, backend=name)


def _sdpa(kernel: SDPBackend) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return run


def _aten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = (x.transpose(1, 2) for x in (q, k, v))
    slots = q.shape[2]
    flash = torch.ops.aten._flash_attention_forward
    out = flash(*rows, None, None, slots, slots, 0.0, True, False, scale=q.shape[3] ** -0.5)[0]
    return out.transpose(1, 2)


def gate(q: Tensor, k: Tensor, pattern: MoBA, by: str = "torch") -> Routes:
    """Centroids and choice, as ``attend`` makes them."""
    segments = Segments.single(q.shape[0], q.shape[2], q.device)
    return route_by(by, q.detach(), centroids_by(by, k.detach(), pattern.block_size, segments), pattern, segments)


def verify_gate(shape: Shape, tensors: list[Tensor], by: str, rows: int = 32) -> dict[str, float]:
    """Errors in units of what float32 sums and one rounding allow; at most 1 is right.

    Sampled means against float64, and of sampled queries the worst block taken against the best one left, by float64
    scores of the same means: no more may be missing than both scores can be off.
    """
    q, k = (x.detach() for x in tensors[:2])
    size, group = shape.block_size, shape.query_heads // shape.key_heads
    segments = Segments.single(shape.batch, shape.length, q.device)
    known = centroids_by(by, k, size, segments)
    index = route_by(by, q, known, shape.pattern, segments).index
    worst = {"means": 0.0, "choice": 0.0}
    dice = torch.Generator().manual_seed(2)
    for _ in range(rows):
        b, h, t = (int(torch.randint(n, (1,), generator=dice)) for n in q.shape[:3])
        mean = known.mean[b, h // group].double()
        n = int(torch.randint(len(mean), (1,), generator=dice))
        keys = k[b, h // group, n * size : (n + 1) * size].double()
        allowed = torch.finfo(shape.dtype).eps / 2 * keys.mean(0).abs() + _sum_error(size) * keys.abs().mean(0)
        worst["means"] = max(worst["means"], float(((mean[n] - keys.mean(0)).abs() / allowed).max()))
        mean = mean[: t // size]
        taken = torch.zeros(len(mean), dtype=torch.bool, device=q.device)
        taken[index[b, h, t][index[b, h, t] >= 0].long()] = True
        if taken.all():
            continue
        score, bound = mean @ q[b, h, t].double(), _sum_error(shape.dim) * (mean.abs() @ q[b, h, t].double().abs())
        missing = score[~taken].max() - score[taken].min()
        worst["choice"] = max(worst["choice"], float(missing / (bound[~taken].max() + bound[taken].max())))
    return worst


def _sum_error(terms: int) -> float:
    return (terms + 1) * torch.finfo(torch.float32).eps / 2


def verify(shape: Shape, tensors: list[Tensor], backend: str, rows: int = 32) -> dict[str, float]:
    """Errors in units of what four roundings of a result allow; at most 1 is right.

    Output and gradient of sampled queries against float64 on the same routes. Gradients of all keys and values by
    their sums: weights add up to one, so ``dv`` adds up to ``dout``, and scores do not change when a query grows as
    its keys shrink, so ``k . dk`` adds up to ``q . dq``.
    """
    q, k, v, dout = tensors
    routes = gate(q, k, shape.pattern)
    out = attend(q, k, v, pattern=shape.pattern, backend=backend, routes=routes)
    grads = torch.autograd.grad(out, (q, k, v), dout) if shape.backward else ()
    unit = 4 * torch.finfo(shape.dtype).eps / 2
    group, worst = shape.query_heads // shape.key_heads, {"out": 0.0}
    dice = torch.Generator().manual_seed(1)
    for _ in range(rows):
        b, h, t = (int(torch.randint(n, (1,), generator=dice)) for n in q.shape[:3])
        want, slope = _exact(q, k, v, dout, routes, (b, h, h // group, t))
        worst["out"] = max(worst["out"], _distance(out[b, h, t], want, unit))
        if slope is not None:
            worst["dq"] = max(worst.get("dq", 0.0), _distance(grads[0][b, h, t], slope, unit))
    if grads:
        dq, dk, dv = grads
        worst["sum of dv"] = _difference(dv, dout.unflatten(1, (-1, group)).sum(2), unit)
        worst["sum of k dk"] = _difference(k.detach() * dk, (q.detach() * dq).unflatten(1, (-1, group)).sum(2), unit)
    return worst


def _exact(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, routes: Routes, at: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """One query's output, and its gradient where there is an output gradient, in float64."""
    b, h, key_head, t = at
    size = routes.block_size
    starts = [int(routes.start[b, n]) for n in routes.index[b, h, t].tolist() if n >= 0]
    slots = [torch.arange(s, s + size) for s in starts] + [torch.arange(t - t % size, t + 1)]
    read = torch.cat(slots).to(q.device)
    keys, values = (x[b, key_head, read].detach().double() for x in (k, v))
    scale = q.shape[3] ** -0.5
    weights = (keys @ q[b, h, t].detach().double() * scale).softmax(0)
    out = weights @ values
    if not dout.numel():
        return out, None
    slope = dout[b, h, t].double()
    return out, (weights * (values @ slope - slope @ out)) @ keys * scale


def _distance(got: Tensor, want: Tensor, unit: float) -> float:
    return float((got.detach().double() - want).norm() / (unit * want.norm()))


def _difference(got: Tensor, want: Tensor, unit: float) -> float:
    """Of two sums over tokens, against the rounding of every term: random signs, so by the root of squares."""
    a, b = (x.detach().sum(2, dtype=torch.float32) for x in (got, want))
    size = got.detach().float().square().sum(2).sqrt() + want.detach().float().square().sum(2).sqrt()
    return float(((a - b).abs() / (8 * unit * size)).max())
