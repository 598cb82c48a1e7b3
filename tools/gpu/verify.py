"""Whether the results of the GPU report are right: sampled queries against float64, sums of gradients, the gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mobazoo.attention import Routes, Segments
from mobazoo.attention.blocks import centroids_by
from mobazoo.attention.routing import route_by
from tools.gpu.shapes import Shape, gate

Routed = Callable[[Tensor, Tensor, Tensor, Routes | None], Tensor]


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


def verify(shape: Shape, tensors: list[Tensor], run: Routed, rows: int = 32) -> dict[str, float]:
    """Errors in units of what four roundings of a result allow; at most 1 is right.

    Output and gradient of sampled queries against float64 on the same routes. Gradients of all keys and values by
    their sums: weights add up to one, so ``dv`` adds up to ``dout``, and scores do not change when a query grows as
    its keys shrink, so ``k . dk`` adds up to ``q . dq``.
    """
    q, k, v, dout = tensors
    routes = gate(q, k, shape.pattern)
    out = run(q, k, v, routes)
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
