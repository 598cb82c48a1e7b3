"""What MoBA's blocks would keep of one layer's full attention, head by head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mobazoo.attention import MoBA, Segments, centroids, route
from mobazoo.attention.blockmask import tile_density

# Scores in memory at a time, in bytes of float32; a handful of tensors of that size live together.
_SCORES = 32 << 20


@dataclass
class Kept:
    """One setting: sums over the queries that have to choose, per query head ``[Hq]`` float64.

    Attributes:
        mass: share of full attention that the own block and the chosen ones hold.
        best: the most that as many blocks could hold.
        hit: 1 where the block of the strongest key is among the chosen.
        queries: how many.
        density: of tiles, one figure a text.
    """

    mass: Tensor
    best: Tensor
    hit: Tensor
    queries: int = 0
    density: list[float] = field(default_factory=list)


@dataclass
class Signal:
    """One block size: sums over the queries with at least two blocks before their own, per query head ``[Hq]``.

    Attributes:
        gap: cosine of the query and its strongest key less the mean cosine over the other blocks' keys.
        queries: how many.
        ahead: by how much the strongest key's block outscores each other block.
        squared: the squares of that.
        pairs: how many.
    """

    gap: Tensor
    ahead: Tensor
    squared: Tensor
    queries: int = 0
    pairs: int = 0

    def expected(self, head_dim: int, block_size: int) -> Tensor:
        """``gap * sqrt(D / (2 * block_size))``, the signal-to-noise ratio of arXiv 2511.11571, per head."""
        return self.gap / self.queries * (head_dim / (2 * block_size)) ** 0.5

    def measured(self) -> Tensor:
        """The same ratio without its assumptions: mean over deviation of the difference of two blocks' scores."""
        mean = self.ahead / self.pairs
        return mean / (self.squared / self.pairs - mean * mean).clamp(min=1e-30).sqrt()


class LayerProbe:
    """Sums over texts for one layer.

    Args:
        heads: query heads.
        patterns: settings to look at; none may read a text whole.
    """

    def __init__(self, heads: int, patterns: Sequence[MoBA]) -> None:
        def zeros() -> Tensor:
            return torch.zeros(heads, dtype=torch.float64)

        self.kept = {pattern: Kept(zeros(), zeros(), zeros()) for pattern in patterns}
        sizes = sorted({pattern.block_size for pattern in patterns})
        self.signal = {size: Signal(zeros(), zeros(), zeros()) for size in sizes}

    @torch.no_grad()
    def add(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Adds one text; never more than some rows of its attention are in memory.

        Args:
            q: ``[Hq, T, D]`` after RoPE.
            k: ``[Hkv, T, D]`` after RoPE.
            scale: of the scores before softmax.
        """
        segments = Segments.single(1, q.shape[1], q.device)
        means, routes = {}, {}
        for pattern, kept in self.kept.items():
            known = centroids(k[None], pattern.block_size, segments)
            found = route(q[None], known, pattern, segments)
            means[pattern.block_size], routes[pattern] = known.mean[0], found.index[0].long()
            kept.density.append(float(tile_density(found, segments, q.shape[1])))
            kept.queries += max(0, q.shape[1] - pattern.top_k * pattern.block_size)
        for size, signal in self.signal.items():
            own = torch.arange(q.shape[1]) // size
            signal.queries += int((own >= 2).sum())
            signal.pairs += int((own - 1).clamp(min=0).sum())
        for rows in _chunks(q, k, scale):
            for size in self.signal:
                seen = _Blocks(rows, means[size][rows.key_head], size)
                self._add_signal(seen, size)
                for pattern, kept in self.kept.items():
                    if pattern.block_size == size:
                        _add_kept(kept, seen, routes[pattern][rows.heads, rows.t0 : rows.t1], pattern.top_k)

    def _add_signal(self, seen: _Blocks, size: int) -> None:
        signal, heads = self.signal[size], seen.rows.heads
        signal.gap[heads] += seen.gap().sum(1).double().cpu()
        ahead = seen.ahead()
        signal.ahead[heads] += ahead.double().sum((1, 2)).cpu()
        signal.squared[heads] += ahead.double().square().sum((1, 2)).cpu()


@dataclass(frozen=True)
class _Rows:
    """Some queries of a group of heads against all keys before them.

    Attributes:
        heads: the group's query heads.
        key_head: the one they share.
        t0: first query.
        t1: the query after the last.
        query: ``[G, t, D]`` float32.
        dots: ``[G, t, t1]`` float32, unscaled, -inf after each query.
        share: ``[G, t, t1]`` full attention.
        cosine: ``[G, t, t1]``.
    """

    heads: slice
    key_head: int
    t0: int
    t1: int
    query: Tensor
    dots: Tensor
    share: Tensor
    cosine: Tensor


def _chunks(q: Tensor, k: Tensor, scale: float) -> Iterator[_Rows]:
    group, length = q.shape[0] // k.shape[0], q.shape[1]
    step = max(1, _SCORES // (4 * group * length))
    place = torch.arange(length, device=q.device)
    for j in range(k.shape[0]):
        heads, keys = slice(j * group, (j + 1) * group), k[j].float()
        for t0 in range(0, length, step):
            t1 = min(t0 + step, length)
            query = q[heads, t0:t1].float()
            dots = query @ keys[:t1].T
            lengths = query.norm(dim=-1)[..., None] * keys[:t1].norm(dim=-1)
            cosine = dots / lengths.clamp(min=1e-30)
            dots = dots.masked_fill(place[:t1] > place[t0:t1, None], float("-inf"))
            yield _Rows(heads, j, t0, t1, query, dots, (dots * scale).softmax(-1), cosine)


class _Blocks:
    """Rows by blocks of one size; ``N`` blocks touch the rows' keys."""

    def __init__(self, rows: _Rows, mean: Tensor, size: int) -> None:
        self.rows, self.size = rows, size
        self.own = torch.arange(rows.t0, rows.t1, device=mean.device) // size  # [t]
        self.mass = self._summed(rows.share)  # [G, t, N]
        number = torch.arange(self.mass.shape[2], device=mean.device)
        self.candidate = number < self.own[:, None]  # [t, N]
        before = torch.arange(rows.t1, device=mean.device) < (self.own * size)[:, None]  # [t, t1]
        self.strongest = rows.dots.masked_fill(~before, float("-inf")).argmax(-1)  # [G, t]
        self.signal = self.strongest // size  # [G, t]; means nothing where there is no candidate
        # Queries of length 1: they differ by orders of magnitude, and the gate's choice does not see it.
        unit = rows.query / rows.query.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        whole = min(mean.shape[0], self.mass.shape[2])
        self.score = torch.zeros_like(self.mass)
        self.score[..., :whole] = unit @ mean[:whole].float().T  # [G, t, N]

    def _summed(self, values: Tensor) -> Tensor:
        missing = -values.shape[-1] % self.size
        return torch.nn.functional.pad(values, (0, missing)).unflatten(-1, (-1, self.size)).sum(-1)

    def gap(self) -> Tensor:
        """``[G, t]``, zeros where there are not two candidates."""
        by_block = self._summed(self.rows.cosine).masked_fill(~self.candidate, 0.0)
        noise = by_block.sum(-1) - _at(by_block, self.signal)
        keys = ((self.own - 1) * self.size).clamp(min=1)
        return (_at(self.rows.cosine, self.strongest) - noise / keys).masked_fill(self.own < 2, 0.0)

    def ahead(self) -> Tensor:
        """``[G, t, N]``, zeros at the strongest key's own block and where there are not two candidates."""
        difference = _at(self.score, self.signal)[..., None] - self.score
        return difference.masked_fill(~self.candidate | (self.own < 2)[:, None], 0.0)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(-1, index[..., None])[..., 0]


def _add_kept(kept: Kept, seen: _Blocks, index: Tensor, top_k: int) -> None:
    """Adds the queries that have more candidates than ``top_k - 1``; ``index`` is ``[G, t, top_k - 1]``."""
    chooses, heads = seen.own >= top_k, seen.rows.heads
    own = seen.mass.gather(-1, seen.own.expand(index.shape[:2])[..., None])[..., 0]
    there = index >= 0
    mass = own + (seen.mass.gather(-1, index.clamp(min=0)) * there).sum(-1)
    most = seen.mass.masked_fill(~seen.candidate, 0.0)
    best = own + most.topk(min(top_k - 1, most.shape[-1]), dim=-1).values.sum(-1)
    hit = ((index == seen.signal[..., None]) & there).any(-1)
    for sums, values in ((kept.mass, mass), (kept.best, best), (kept.hit, hit)):
        sums[heads] += (values.double() * chooses).sum(1).cpu()
