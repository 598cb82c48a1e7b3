"""What blocks keep of full attention: against S x S matrices in float64, and against what theory says of noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mobazoo
from mobazoo.attention import MoBA
from mobazoo.probe import masses
from mobazoo.probe.masses import LayerProbe
from mobazoo.probe.run import probe_layers

PATTERNS = [MoBA(8, 2), MoBA(8, 3), MoBA(5, 4)]


def brute(q: Tensor, k: Tensor, scale: float, pattern: MoBA) -> dict[str, Tensor]:
    """Every figure of one text from whole matrices, token by token. ``q [Hq, T, D]``, ``k [Hkv, T, D]``."""
    heads, length, dim = q.shape
    size, top_k = pattern.block_size, pattern.top_k
    q, k = q.double(), k.double().repeat_interleave(heads // k.shape[0], 0)
    found: dict[str, list[list[float]]] = {name: [] for name in ("mass", "best", "hit", "gap")}
    measured = []
    for h in range(heads):
        ahead: list[float] = []
        here: dict[str, list[float]] = {name: [] for name in found}
        for t in range(length):
            dots = k[h, : t + 1] @ q[h, t]
            share, own = (dots * scale).softmax(0), t // size
            if own < 2:
                continue
            blocks = [slice(n * size, (n + 1) * size) for n in range(own)]
            score = [float(q[h, t] @ k[h, block].float().mean(0).double()) for block in blocks]
            strongest = int(dots[: own * size].argmax())
            cosine = dots / (q[h, t].norm() * k[h, : t + 1].norm(dim=1))
            noise = [float(c) for i, c in enumerate(cosine[: own * size]) if i // size != strongest // size]
            here["gap"].append(float(cosine[strongest]) - sum(noise) / len(noise))
            signal = score[strongest // size]
            ahead += [(signal - s) / float(q[h, t].norm()) for n, s in enumerate(score) if n != strongest // size]
            if own >= top_k:
                order = sorted(range(own), key=lambda n: -score[n])[: top_k - 1]
                kept = [float(share[block].sum()) for block in blocks]
                rest = float(share[own * size :].sum())
                here["mass"].append(rest + sum(kept[n] for n in order))
                here["best"].append(rest + sum(sorted(kept)[-(top_k - 1) :]))
                here["hit"].append(float(strongest // size in order))
        for name, values in here.items():
            found[name].append([sum(values) / len(values)])
        many = torch.tensor(ahead, dtype=torch.float64)
        measured.append(float(many.mean() / many.std(correction=0)))
    result = {name: torch.tensor(values, dtype=torch.float64)[:, 0] for name, values in found.items()}
    return {**result, "snr": result["gap"] * math.sqrt(dim / (2 * size)), "measured": torch.tensor(measured)}


@pytest.mark.parametrize("budget", [1, 32 << 20])
def test_figures_are_those_of_whole_matrices(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masses, "_SCORES", budget)  # one query at a time, or all of them
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 61, 16, generator=generator), torch.randn(2, 61, 16, generator=generator)
    q = q + k.repeat_interleave(2, 0).roll(9, 1)  # attention that means something
    layer = LayerProbe(4, PATTERNS)
    layer.add(q, k, 0.3)
    for pattern in PATTERNS:
        want, kept, signal = brute(q, k, 0.3, pattern), layer.kept[pattern], layer.signal[pattern.block_size]
        for name in ("mass", "best", "hit"):
            torch.testing.assert_close(getattr(kept, name) / kept.queries, want[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(signal.gap / signal.queries, want["gap"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(signal.expected(16, pattern.block_size), want["snr"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(signal.measured(), want["measured"].double(), atol=1e-4, rtol=1e-4)
        assert (kept.mass <= kept.best + 1e-9).all()
        assert (kept.mass / kept.queries < 0.999).all()


def test_texts_add_up() -> None:
    generator = torch.Generator().manual_seed(1)
    texts = [(torch.randn(2, 40, 8, generator=generator), torch.randn(1, 40, 8, generator=generator)) for _ in range(2)]
    both, apart = LayerProbe(2, PATTERNS), [LayerProbe(2, PATTERNS) for _ in texts]
    for one, (q, k) in zip(apart, texts, strict=True):
        one.add(q, k, 1.0)
        both.add(q, k, 1.0)
    for pattern in PATTERNS:
        torch.testing.assert_close(both.kept[pattern].mass, sum(one.kept[pattern].mass for one in apart))
        assert both.kept[pattern].queries == 2 * (40 - pattern.top_k * pattern.block_size)


def test_the_ratio_of_unit_vectors_is_the_one_measured() -> None:
    """The paper's assumptions hold for unrelated unit vectors, where its formula and the measurement must agree."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(2, 4096, 64, generator=generator), dim=-1) for _ in range(2))
    layer = LayerProbe(2, [MoBA(16, 4)])
    layer.add(q, k, 1.0)
    signal = layer.signal[16]
    torch.testing.assert_close(signal.measured(), signal.expected(64, 16), rtol=0.05, atol=0.0)


def test_a_model_is_probed_with_full_attention(plain: Path, zoo: Path) -> None:
    """The zoo checkpoint's own rules are set aside, and each layer gets its own figures."""
    ids = torch.randint(257, (2, 64), generator=torch.Generator().manual_seed(0))
    told: list[Any] = []
    dense, sparse = (
        probe_layers(mobazoo.load(folder), ids, [MoBA(8, 2)], lambda *said: told.append(said))
        for folder in (plain, zoo)
    )
    for one, other in zip(dense, sparse, strict=True):
        assert torch.equal(one.kept[MoBA(8, 2)].mass, other.kept[MoBA(8, 2)].mass)
    assert not torch.allclose(dense[0].kept[MoBA(8, 2)].mass, dense[1].kept[MoBA(8, 2)].mass)
    assert told[-1] == ("attention mass", 2, 2)
