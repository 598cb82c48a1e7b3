"""``mobazoo bench`` by options: attention alone, and the pages of docs/benchmarks."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from mobazoo.bench import decode
from mobazoo.bench.attention import (
    Case,
    Growth,
    Result,
    Timed,
    growth,
    measured,
    stages,
    suite_cpu,
    suite_growth,
    verdict,
)
from mobazoo.bench.page import bench_page, described, is_bench_page
from mobazoo.bench.ratios import Bound, Verdict
from mobazoo.config.dtypes import Dtype
from mobazoo.errors import InputError, MobazooError
from mobazoo.files import check_place, check_result_place, write_whole
from mobazoo.results import machine

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")
_OF_A_CASE = ("length", "block_size", "top_k", "dtype", "backward", "backend")


@app.command(
    epilog="Examples: `mobazoo bench --length 16384 --block-size 128 --top-k 8 --backward`, "
    "`mobazoo bench --suite cpu --json cpu.json`; by a recipe `mobazoo bench prefill model=./folder`, on a checkpoint"
)
def main(
    context: typer.Context,
    suite: Annotated[
        str, typer.Option(help="`cpu` or `decode`: the figures of docs/benchmarks. Empty: one case.")
    ] = "",
    length: Annotated[int, typer.Option(min=1, help="Tokens of the row.")] = 32768,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = 512,
    top_k: Annotated[int, typer.Option(min=1, help="Blocks a query reads, its own included.")] = 3,
    dtype: Annotated[Dtype, typer.Option(help="Of q, k and v.")] = "float32",
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
        if suite not in ("", "cpu", "decode"):
            raise InputError(f"bench: unknown suite {suite!r}; known: cpu, decode")
        if suite and (given := _given(context)):
            raise InputError(f"bench: --suite {suite} has cases of its own; leave out {', '.join(given)}")
        check_result_place(json_path, ("machine", "results"))
        if markdown is not None:
            check_place(markdown, is_bench_page)
        torch.set_num_threads(threads)
        if suite == "decode":  # its own rivals and table
            _end(decode.run(console, rounds, json_path, markdown, dry_run))
            return
        one = Case(length, block_size, top_k, dtype, backward, backend)
        cases: list[tuple[Case, Bound | None]] = list(suite_cpu()) if suite else [(one, None)]
        growing = list(suite_growth()) if suite else []
        if dry_run:
            for case, bound in cases:
                console.print(f"would time {case.label()} {bound or ''}".rstrip())
            for case in growing:
                console.print(f"would time {case.label()} against half the length")
            return
        results = measured(cases, rounds, console)
        growths = []
        for case in growing:
            growths.append(growth(case, 2 * rounds + 1))  # both its times vary, and the bound is near
            console.print(f"time per token against half the length: {growths[-1].line()}")
        for result, _ in results:  # after all timing: a profiler leaves a process slower than it found it
            case = result.case
            if not case.backward and case.length >= 32768 and result.backend.endswith("flash"):
                result.stages = stages(case)
                console.print(_stages_line(result))
        verdicts = [verdict(result, bound, results) for result, bound in results]
        rows = [_cells(result, said) for (result, _), said in zip(results, verdicts, strict=True)]
        console.print(_rich(rows))
        console.print(described(machine()))
        if json_path is not None:
            timed = [{**result.row(), **asdict(said)} for (result, _), said in zip(results, verdicts, strict=True)]
            found = {"machine": machine(), "results": timed, "growth": [each.row() for each in growths]}
            write_whole(json_path, json.dumps(found, indent=1) + "\n")
        if markdown is not None:
            write_whole(markdown, _markdown(rows, results, growths, suite))
        _end([*verdicts, *(each.verdict for each in growths)])
    except MobazooError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _end(verdicts: list[Verdict]) -> None:
    """Ends with 1, so that a script may ask, where a suite misses a bound; everything is written by then."""
    if missed := sum(each.missed for each in verdicts):
        typer.echo(f"missed {missed} of the suite's bounds: see the table", err=True)
        raise typer.Exit(1)


def _given(context: typer.Context) -> list[str]:
    """The options of one case that the command line names."""
    sources = {name: context.get_parameter_source(name) for name in _OF_A_CASE}
    return [
        f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name == "COMMANDLINE"
    ]


HEADER = ("case", "backend", "full ms", "MoBA ms", "times faster", "range", "bound")


def _cells(result: Result, said: Verdict) -> tuple[str, ...]:
    return (
        result.case.label(),
        result.backend,
        f"{1e3 * median(result.full):.1f}",
        f"{1e3 * median(result.moba):.1f}",
        f"{result.speedup:.2f}",
        f"{min(result.ratios):.2f} to {max(result.ratios):.2f}",
        str(said),
    )


def _rich(rows: list[tuple[str, ...]]) -> Table:
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*row)
    return table


def _stages_line(result: Result) -> str:
    spent = ", ".join(f"{name} {1e3 * value:.0f}" for name, value in result.stages.items())
    return f"{result.case.label()}: {spent} (ms)"


def _markdown(rows: list[tuple[str, ...]], results: list[Timed], growths: list[Growth], suite: str) -> str:
    """The page docs/benchmarks/cpu.md."""
    words = [
        "Batch 1, 4 query and 2 key heads, head dim 64, random inputs. Full attention is",
        "`scaled_dot_product_attention(is_causal=True)` on repeated keys and values. Times are medians; a ratio is the",
        "median over paired rounds, the range its extremes.",
    ]
    after = [
        *(["How MoBA's time per token grows from half the length, paired (and its range):", ""] if growths else []),
        *(f"- {each.line()}" for each in growths),
        *([""] if growths else []),
        "Where a thread spends the forward of one key head (the gate timed alone, the rest by its own clock):",
        "",
        *(f"- {_stages_line(result)}" for result, _ in results if result.stages),
    ]
    return bench_page("MoBA against full attention on a CPU", suite, machine(), words, HEADER, rows, after)
