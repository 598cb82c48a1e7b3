"""Times attention by blocks against full attention, paired.

The rival is what a user would call instead, ``scaled_dot_product_attention(is_causal=True)`` on repeated keys and
values. Each round times the rival once and mobazoo a few times right after it, and a ratio belongs to its round, so
that a machine whose speed drifts does not favour either.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mobazoo.attention import Full, MoBA, Pattern, Routes, Segments, attend, centroids, route
from mobazoo.attention.auto import choose
from mobazoo.attention.kernels import cpu, cpu_compiled
from mobazoo.attention.kernels.layout import Layout
from mobazoo.attention.problem import Problem
from mobazoo.bench.ratios import Bound, Verdict, ratios, speedup

GROWTH_BOUND = Bound("<=", 1.15)
_OF_FLOAT32 = "float32's"


@dataclass(frozen=True)
class Case:
    """One comparison: MoBA on ``backend`` against full attention."""

    length: int = 32768
    block_size: int = 512
    top_k: int = 3
    dtype: str = "float32"
    backward: bool = False
    backend: str = "auto"
    batch: int = 1
    query_heads: int = 4
    key_heads: int = 2
    head_dim: int = 64

    def torch_dtype(self) -> torch.dtype:
        """Its dtype as torch has it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def label(self) -> str:
        """The case in a few words."""
        work = "forward + backward" if self.backward else "forward"
        return f"{work}, {self.length} tokens, block {self.block_size}, top {self.top_k}, {self.dtype}"


@dataclass
class Result:
    """Seconds of each round's rival and of mobazoo (median of the round's repeats), and their ratio per round."""

    case: Case
    backend: str
    full: list[float]
    moba: list[float]
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """How many times faster than full attention, per round."""
        return ratios(self.full, self.moba)

    @property
    def speedup(self) -> float:
        """Median ratio."""
        return median(self.ratios)

    def row(self) -> dict[str, Any]:
        """What is written to JSON."""
        return {
            **asdict(self.case),
            "backend": self.backend,
            "full_s": median(self.full),
            "moba_s": median(self.moba),
            **speedup(self.full, self.moba),
            "stages_s": self.stages,
        }


Timed = tuple[Result, Bound | None]


@dataclass(frozen=True)
class Growth:
    """How MoBA's time per token grows from half of a case's length to the whole, by round: 1.1 is 10 % more."""

    case: Case
    ratios: list[float]

    @property
    def verdict(self) -> Verdict:
        """What becomes of the bound."""
        return GROWTH_BOUND.verdict(median(self.ratios))

    def line(self) -> str:
        """It in a few words."""
        middle, low, high = (
            f"{100 * (ratio - 1):+.0f} %" for ratio in (median(self.ratios), min(self.ratios), max(self.ratios))
        )
        return f"{self.case.label()}: {middle} ({low} to {high}); as a ratio {self.verdict}"

    def row(self) -> dict[str, Any]:
        """What is written to JSON."""
        return {**asdict(self.case), "growth": self.ratios, **asdict(self.verdict)}


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Random ``q``, ``k``, ``v`` of a case: unrelated, the worst case for anything that hopes for locality."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        x = torch.randn(case.batch, heads, case.length, case.head_dim, generator=generator)
        return x.to(case.torch_dtype()).requires_grad_(case.backward)

    return draw(case.query_heads), draw(case.key_heads), draw(case.key_heads)


def pair(case: Case, rounds: int = 3, repeats: int = 3) -> Result:
    """Times one case against full attention: ``rounds`` pairs after a warm-up of both."""
    q, k, v = inputs(case)
    group = case.query_heads // case.key_heads
    pattern = MoBA(case.block_size, case.top_k)
    keys, values = (x.detach().repeat_interleave(group, 1).requires_grad_(case.backward) for x in (k, v))
    dout = torch.randn_like(q)

    def full() -> None:
        out = scaled_dot_product_attention(q, keys, values, is_causal=True)
        if case.backward:
            torch.autograd.grad(out, (q, keys, values), dout)

    def moba() -> None:
        out = attend(q, k, v, pattern=pattern, backend=case.backend)
        if case.backward:
            torch.autograd.grad(out, (q, k, v), dout)

    warm = (seconds(full), seconds(moba))
    if max(warm) < 0.05:  # short calls: more of them, or the clock decides
        rounds, repeats = 4 * rounds, 4 * repeats
    fulls, mobas = [], []
    for _ in range(rounds):
        fulls.append(median(seconds(full) for _ in range(repeats if warm[0] < 0.5 else 1)))
        mobas.append(median(seconds(moba) for _ in range(repeats)))
    return Result(case, _backend_of(case, pattern), fulls, mobas)


def measured(cases: list[tuple[Case, Bound | None]], rounds: int, console: Console) -> list[Timed]:
    """Every case; several are gone through round by round, so that a busy minute of the machine is not one's alone."""
    passes = rounds if len(cases) > 1 else 1
    results: list[Timed] = []
    for done in range(passes):
        for i, (case, bound) in enumerate(cases):
            result = pair(case, rounds // passes)
            if done:
                before = results[i][0]
                result = replace(result, full=before.full + result.full, moba=before.moba + result.moba)
                results[i] = (result, bound)
            else:
                results.append((result, bound))
            last = f"round {done + 1} of {passes}: " if passes > 1 else ""
            console.print(f"{last}{case.label()}: [bold]{result.speedup:.2f}x[/] {bound or ''}")
    return results


def growth(case: Case, rounds: int = 3, repeats: int = 3) -> Growth:
    """Times a forward of half a case's length and of the whole right after it, ``rounds`` times after a warm-up."""
    pattern = MoBA(case.block_size, case.top_k)

    def forward(length: int) -> Callable[[], object]:
        q, k, v = inputs(replace(case, length=length))
        return lambda: attend(q, k, v, pattern=pattern, backend=case.backend)

    half, whole = forward(case.length // 2), forward(case.length)
    found = []
    for _ in range(rounds + 1):
        before = median(seconds(half) for _ in range(repeats))
        found.append(median(seconds(whole) for _ in range(repeats)) / before / 2)
    return Growth(case, found[1:])


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _backend_of(case: Case, pattern: Pattern) -> str:
    if case.backend != "auto":
        return case.backend
    if isinstance(pattern, MoBA) and pattern.covers(case.length):
        pattern = Full()
    problem = Problem(
        pattern, "cpu", case.torch_dtype(), case.head_dim, case.backward, queries=case.length, slots=case.length
    )
    return f"auto: {choose(problem)[0]}"


def stages(case: Case) -> dict[str, float]:
    """Where one of the threads spends a forward of the CPU flash path, in seconds by stage.

    This runs one key head on one thread: the gate alone, and the rest by the compiled code's own clock.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _stages(replace(case, query_heads=case.query_heads // case.key_heads, key_heads=1))
    finally:
        torch.set_num_threads(threads)


def _stages(case: Case) -> dict[str, float]:
    q, k, v = (x.detach() for x in inputs(case))
    pattern, scale = MoBA(case.block_size, case.top_k), case.head_dim**-0.5
    segments = Segments.single(case.batch, case.length)

    def gate() -> Routes:
        return route(q, centroids(k, pattern.block_size, segments), pattern, segments)

    layout = Layout.of(segments, gate(), 0)
    took = {"gate": min(seconds(gate) for _ in range(3))}
    cpu.forward(q, k, v, layout, scale)
    if not cpu_compiled.serves(case.torch_dtype()):
        return took | {"attention": seconds(lambda: cpu.forward(q, k, v, layout, scale))}
    spent = torch.zeros(len(cpu_compiled.STAGES), dtype=torch.float64)
    cpu_compiled.forward(q, k, v, layout, scale, spent)
    return took | dict(zip(cpu_compiled.STAGES, spent.tolist(), strict=True))


def suite_growth() -> Iterator[Case]:
    """Whose time per token is compared with that of half the length."""
    yield Case(length=65536)
    yield Case(length=65536, block_size=128, top_k=8)


def suite_cpu() -> Iterator[tuple[Case, Bound | None]]:
    """The cases of docs/benchmarks/cpu.md, each with the bound it is held against."""
    for dtype in ("float32", "bfloat16"):
        same = None if dtype == "float32" else Bound(">=", 0.9, of=_OF_FLOAT32)
        yield Case(dtype=dtype), same or Bound(">=", 8.5)
        yield Case(dtype=dtype, block_size=128, top_k=8), same or Bound(">=", 7)
        yield Case(dtype=dtype, backward=True), same or Bound(">=", 7)
        yield Case(dtype=dtype, block_size=128, top_k=8, backward=True), same
    for block_size, top_k in ((512, 3), (128, 8)):
        reads = block_size * top_k
        for length in (reads // 2, reads, reads * 3 // 2, reads * 2, reads * 4):
            bound = Bound(">=", 0.95, note="exact") if length <= reads else Bound(">=", 0.77, note="window")
            yield Case(length=length, block_size=block_size, top_k=top_k), bound
        for length in (4096, 8192, 16384, 65536):
            yield Case(length=length, block_size=block_size, top_k=top_k), Bound(">", 1) if length > 4096 else None
    # So short that Python's part of a call takes as long as attention: no bound, but everybody's to see.
    for length in (64, 128, 256):
        yield Case(length=length), None
    for block_size, length in ((16, 96), (64, 384)):
        yield Case(length=length, block_size=block_size), None


def verdict(result: Result, bound: Bound | None, results: list[Timed]) -> Verdict:
    """What becomes of a case's bound; among ``results`` is the one that it may refer to."""
    if bound is None:
        return Verdict()
    like = replace(result.case, dtype="float32")
    other = next((each.speedup for each, _ in results if bound.of and each.case == like), 1.0)
    return bound.verdict(result.speedup, other)
