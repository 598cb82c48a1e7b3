"""Times attention by blocks against full attention, paired: ``mobazoo bench --help`` (or ``python -m mobazoo.bench``).

The rival is what a user would call instead, ``scaled_dot_product_attention(is_causal=True)`` on repeated keys and
values. Each round times the rival once and mobazoo a few times right after it, and a ratio belongs to its round, so
that a machine whose speed drifts does not favour either.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from mobazoo.attention import Full, MoBA, Pattern, Segments, attend, centroids, route
from mobazoo.attention.auto import choose
from mobazoo.attention.kernels import cpu
from mobazoo.attention.problem import Problem
from mobazoo.errors import InputError, MobazooError
from mobazoo.results import machine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        return [full / moba for full, moba in zip(self.full, self.moba, strict=True)]

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
            "speedup": self.speedup,
            "speedup_min": min(self.ratios),
            "speedup_max": max(self.ratios),
            "stages_s": self.stages,
        }


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Random ``q``, ``k``, ``v`` of a case: unrelated, the worst case for anything that hopes for locality."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int) -> Tensor:
        x = torch.randn(case.batch, heads, case.length, case.head_dim, generator=generator)
        return x.to(DTYPES[case.dtype]).requires_grad_(case.backward)

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


def measured(cases: list[tuple[Case, str]], rounds: int, console: Console) -> list[tuple[Result, str]]:
    """Every case; several are gone through round by round, so that a busy minute of the machine is not one's alone."""
    passes = rounds if len(cases) > 1 else 1
    results: list[tuple[Result, str]] = []
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
            console.print(f"{last}{case.label()}: [bold]{result.speedup:.2f}x[/] {bound}")
    return results


def seconds(work: Callable[[], None]) -> float:
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
        pattern, "cpu", DTYPES[case.dtype], case.head_dim, case.backward, queries=case.length, slots=case.length
    )
    return f"auto: {choose(problem)[0]}"


_STAGE_OF = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "routed kernel",
    "aten::index_select": "gather",
    "aten::sort": "sort",
    "aten::div_": "sort",
    "aten::bincount": "sort",
}


def stages(case: Case) -> dict[str, float]:
    """Where a forward of the CPU flash path spends its time, in seconds by stage, from one profiled run."""
    q, k, v = (x.detach() for x in inputs(case))
    pattern = MoBA(case.block_size, case.top_k)
    segments = Segments.single(case.batch, case.length)
    routes = route(q, centroids(k, pattern.block_size, segments), pattern, segments)
    fixed = (segments.doc, segments.pos, 0, pattern.block_size, case.head_dim**-0.5)
    cpu.forward(q, k, v, routes.index, routes.start, *fixed)
    took = {
        "gate": min(
            seconds(lambda: (route(q, centroids(k, pattern.block_size, segments), pattern, segments), None)[1])
            for _ in range(3)
        ),
        "own blocks": min(
            seconds(lambda: (cpu.forward(q, k, v, routes.index[..., :0], routes.start, *fixed), None)[1])
            for _ in range(3)
        ),
    }
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        total = seconds(lambda: (cpu.forward(q, k, v, routes.index, routes.start, *fixed), None)[1])
    spent = {"sort": 0.0, "gather": 0.0, "routed kernel": -took["own blocks"]}
    for event in prof.key_averages():
        stage = _STAGE_OF.get(event.key)
        if stage is not None:
            spent[stage] += event.cpu_time_total / 1e6
    merge = total - took["own blocks"] - sum(spent.values())
    return {**took, **spent, "merge and the rest": merge}


def suite_cpu() -> Iterator[tuple[Case, str]]:
    """The cases of docs/benchmarks/cpu.md, each with the bound it is held against."""
    for dtype in ("float32", "bfloat16"):
        same = "" if dtype == "float32" else "at most 10 % below float32"
        yield Case(dtype=dtype), same or ">= 8.5"
        yield Case(dtype=dtype, block_size=128, top_k=8), same or ">= 7"
        yield Case(dtype=dtype, backward=True), same or ">= 7"
        yield Case(dtype=dtype, block_size=128, top_k=8, backward=True), same
    for block_size, top_k in ((512, 3), (128, 8)):
        reads = block_size * top_k
        for length in (reads // 2, reads, reads * 3 // 2, reads * 2, reads * 4):
            bound = ">= 0.95 (exact)" if length <= reads else ">= 0.7 (window)"
            yield Case(length=length, block_size=block_size, top_k=top_k), bound
        for length in (4096, 8192, 16384, 65536):
            yield Case(length=length, block_size=block_size, top_k=top_k), "> 1" if length > 4096 else ""


app = typer.Typer(add_completion=False, rich_markup_mode="markdown")


@app.command(
    epilog="Examples: `mobazoo bench --length 16384 --block-size 128 --top-k 8 --backward`, "
    "`mobazoo bench --suite cpu --json cpu.json`; by a recipe `mobazoo bench prefill model=./folder`, on a checkpoint"
)
def main(
    suite: Annotated[
        str, typer.Option(help="`cpu` or `decode`: the figures of docs/benchmarks. Empty: one case.")
    ] = "",
    length: Annotated[int, typer.Option(min=1, help="Tokens of the row.")] = 32768,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = 512,
    top_k: Annotated[int, typer.Option(min=1, help="Blocks a query reads, its own included.")] = 3,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of q, k and v.")] = "float32",
    backward: Annotated[bool, typer.Option("--backward", help="Time forward and backward.")] = False,
    backend: Annotated[str, typer.Option(help="auto, or a backend by name.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Paired rounds a case.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write every figure here.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table here, with command and machine.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be timed; time nothing.")] = False,
) -> None:
    """Times MoBA against full causal attention on this machine's CPU and prints where the time goes."""
    console = Console(width=None if sys.stdout.isatty() else 200)  # a table in a file is not cut to 80 columns
    try:
        torch.set_num_threads(threads)
        if suite == "decode":  # its own rivals and table
            import_module("mobazoo.bench_decode").run(console, rounds, json_path, markdown, dry_run)
            return
        if suite not in ("", "cpu"):
            raise InputError(f"bench: unknown suite {suite!r}; known: cpu, decode")
        one = Case(length, block_size, top_k, dtype, backward, backend)
        cases = list(suite_cpu()) if suite else [(one, "")]
        if dry_run:
            for case, bound in cases:
                console.print(f"would time {case.label()} {bound}".rstrip())
            return
        results = measured(cases, rounds, console)
        for result, _ in results:  # after all timing: a profiler leaves a process slower than it found it
            case = result.case
            if not case.backward and case.length >= 32768 and result.backend.endswith("flash"):
                result.stages = stages(case)
                console.print(_stages_line(result))
        console.print(_rich(results))
        console.print(_machine_line())
        if json_path is not None:
            rows = [{**result.row(), "bound": bound} for result, bound in results]
            json_path.write_text(json.dumps({"machine": machine(), "results": rows}, indent=1) + "\n")
        if markdown is not None:
            markdown.write_text(_markdown(results, suite))
    except MobazooError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


HEADER = ("case", "backend", "full ms", "MoBA ms", "times faster", "range", "bound")


def _cells(result: Result, bound: str) -> tuple[str, ...]:
    return (
        result.case.label(),
        result.backend,
        f"{1e3 * median(result.full):.1f}",
        f"{1e3 * median(result.moba):.1f}",
        f"{result.speedup:.2f}",
        f"{min(result.ratios):.2f} to {max(result.ratios):.2f}",
        bound,
    )


def _rich(results: list[tuple[Result, str]]) -> Table:
    table = Table(*HEADER)
    for result, bound in results:
        table.add_row(*_cells(result, bound))
    return table


def _machine_line() -> str:
    return ", ".join(f"{name} {value}" for name, value in machine().items())


def _stages_line(result: Result) -> str:
    spent = ", ".join(f"{name} {1e3 * value:.0f}" for name, value in result.stages.items())
    return f"{result.case.label()}: {spent} (ms)"


def _markdown(results: list[tuple[Result, str]], suite: str) -> str:
    """The page docs/benchmarks/cpu.md: written whole by a command, never by hand."""
    lines = [
        "# MoBA against full attention on a CPU",
        "",
        f"Written by `python -m mobazoo.bench --suite {suite} --markdown ...`; {_machine_line()}.",
        "",
        "Batch 1, 4 query and 2 key heads, head dim 64, random inputs. Full attention is",
        "`scaled_dot_product_attention(is_causal=True)` on repeated keys and values. Times are medians; a ratio is the",
        "median over paired rounds, the range its extremes.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + " --- |" * len(HEADER),
        *("| " + " | ".join(_cells(result, bound)) + " |" for result, bound in results),
        "",
        "Where the forward spends its time (gate and own blocks timed alone, the rest from a profiled run):",
        "",
        *(f"- {_stages_line(result)}" for result, _ in results if result.stages),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()
