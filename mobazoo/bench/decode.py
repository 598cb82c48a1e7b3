"""Times one decoded token against a long cache, and chunked prefill: ``mobazoo bench --suite decode``.

A token is what attention costs a step of the model: in every layer the cache takes the new key and value, the gate
chooses, and the chosen blocks are read. Its rivals only attend, densely, over the same cached keys: with a group's
query heads folded into query rows, which is what ``decode: full`` does, and with ``enable_gqa=True``. Every round times
all of them one after another with new queries, and a ratio belongs to its round.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mobazoo.attention import Full, MoBA, Routes, attend, route
from mobazoo.bench.attention import seconds
from mobazoo.bench.page import bench_page, described
from mobazoo.bench.ratios import Bound, Verdict, ratios
from mobazoo.files import write_whole
from mobazoo.nn.cache_layer import MobaCacheLayer
from mobazoo.nn.rows import Rows
from mobazoo.results import machine


@dataclass(frozen=True)
class Sizes:
    """A model's attention: layers, heads and the pattern."""

    layers: int = 8
    query_heads: int = 8
    key_heads: int = 2
    head_dim: int = 64
    pattern: MoBA = MoBA(512, 8)

    def draw(self, heads: int, length: int) -> Tensor:
        """Random ``[1, heads, length, D]``, unrelated as nothing in a model would be."""
        return torch.randn(1, heads, length, self.head_dim)


@dataclass(frozen=True)
class Line:
    """One comparison: milliseconds of both in every round, and the bound on their ratio."""

    name: str
    rival: str
    ours: list[float]
    theirs: list[float]
    bound: Bound | None

    @property
    def ratios(self) -> list[float]:
        """Rival's time over ours for speed, ours over the rival's where the bound is on a slowdown."""
        slower = self.bound is not None and self.bound.sign == "<="
        return ratios(self.ours, self.theirs) if slower else ratios(self.theirs, self.ours)

    @property
    def verdict(self) -> Verdict:
        """What becomes of the bound."""
        return self.bound.verdict(median(self.ratios)) if self.bound else Verdict()

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        spread = f"{min(self.ratios):.2f} to {max(self.ratios):.2f}"
        return (
            self.name,
            f"{median(self.ours):.2f}",
            self.rival,
            f"{median(self.theirs):.2f}",
            f"{median(self.ratios):.2f}",
            spread,
            str(self.verdict),
        )


HEADER = ("what", "ms", "against", "ms", "ratio", "range", "bound")


class Step:
    """Layers with caches of ``length`` tokens, to decode against."""

    def __init__(self, sizes: Sizes, length: int, steps: int) -> None:
        self.sizes, self.length, self.rows = sizes, length, Rows(1)
        self.layers = [MobaCacheLayer(max_length=length + steps) for _ in range(sizes.layers)]
        for layer in self.layers:
            k, v = sizes.draw(sizes.key_heads, length), sizes.draw(sizes.key_heads, length)
            layer.update(k, v, sizes.pattern.block_size, self.rows)

    def inputs(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """A new token's query, key and value in every layer."""
        sizes = self.sizes
        return [
            (sizes.draw(sizes.query_heads, 1), sizes.draw(sizes.key_heads, 1), sizes.draw(sizes.key_heads, 1))
            for _ in self.layers
        ]

    def sparse(self, inputs: list[tuple[Tensor, Tensor, Tensor]]) -> list[Routes]:
        """One token through all layers, ``decode: moba``."""
        chosen = []
        for layer, (q, k, v) in zip(self.layers, inputs, strict=True):
            keys, values = layer.update(k, v, self.sizes.pattern.block_size, self.rows)
            segments = self.rows.segments(keys.shape[2], layer.room, q.device)
            routes = route(q, layer.centroids(self.rows), self.sizes.pattern, segments)
            attend(q, keys, values, pattern=self.sizes.pattern, routes=routes, segments=segments)
            chosen.append(routes)
        return chosen

    def full(self, inputs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """``decode: full`` over the cached keys."""
        for layer, (q, _, _) in zip(self.layers, inputs, strict=True):
            keys, values = self._kept(layer)
            attend(q, keys, values, pattern=Full(), segments=self.rows.segments(keys.shape[2], layer.room, q.device))

    def folded(self, inputs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Dense attention, a group's heads as query rows."""
        for layer, (q, _, _) in zip(self.layers, inputs, strict=True):
            scaled_dot_product_attention(q.unflatten(1, (self.sizes.key_heads, -1)).flatten(2, 3), *self._kept(layer))

    def shared(self, inputs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Dense attention, ``enable_gqa=True``."""
        for layer, (q, _, _) in zip(self.layers, inputs, strict=True):
            scaled_dot_product_attention(q, *self._kept(layer), enable_gqa=True)

    def _kept(self, layer: MobaCacheLayer) -> tuple[Tensor, Tensor]:
        assert layer.keys is not None
        assert layer.values is not None
        return layer.keys, layer.values


def blocks_read(routes: list[Routes], key_heads: int) -> int:
    """Different blocks that one token reads over all layers and key heads, own blocks included."""
    return sum(
        1 + len(set(index.flatten().tolist()) - {-1})
        for one in routes
        for index in one.index[0].unflatten(0, (key_heads, -1))
    )


def decode_lines(sizes: Sizes, long: int, short: int, rounds: int, repeats: int) -> tuple[list[Line], str]:
    """One token at ``long`` cached tokens against dense attention there, and against itself at ``short``."""
    steps = 2 + rounds * repeats
    far, near = Step(sizes, long, steps), Step(sizes, short, steps)
    took: dict[str, list[float]] = {name: [] for name in ("sparse", "near", "full", "folded", "shared")}
    read: list[int] = []

    def token(step: Step) -> float:
        inputs, chosen = step.inputs(), list[list[Routes]]()
        spent = seconds(lambda: chosen.append(step.sparse(inputs)))
        if step is far:
            read.append(blocks_read(chosen[0], sizes.key_heads))
        return 1e3 * spent

    for step in (far, near):
        token(step)
    for dense in (far.full, far.folded, far.shared):
        dense(far.inputs())
    for _ in range(rounds):
        inputs = far.inputs()
        for name, dense in (("folded", far.folded), ("shared", far.shared), ("full", far.full)):
            took[name].append(1e3 * seconds(partial(dense, inputs)))
        took["sparse"].append(median(token(far) for _ in range(repeats)))
        took["near"].append(median(token(near) for _ in range(repeats)))
    what, name = f"a token at {_tokens(long)}, decode: moba", f"dense at {_tokens(long)}"
    sparse = took["sparse"]
    lines = [
        Line(what, f"{name}, heads folded", sparse, took["folded"], Bound(">=", 5)),
        Line(what, f"{name}, enable_gqa", sparse, took["shared"], Bound(">=", 10)),
        Line(what, f"the same at {_tokens(short)}", sparse, took["near"], Bound("<=", 1.5)),
        Line(f"a token at {_tokens(long)}, decode: full", f"{name}, heads folded", took["full"], took["folded"], None),
    ]
    block = 2 * 4 * sizes.head_dim * sizes.pattern.block_size
    sparse_bytes, dense_bytes = median(read) * block, 2 * 4 * sizes.head_dim * long * sizes.key_heads * sizes.layers
    note = (
        f"Keys and values read for a token: dense {dense_bytes / 2**20:.0f} MiB, sparse {sparse_bytes / 2**20:.0f} MiB "
        f"({median(read) / sizes.layers / sizes.key_heads:.1f} different blocks of {long // sizes.pattern.block_size} "
        f"per layer and key head): bytes allow a ratio of {dense_bytes / sparse_bytes:.1f}. Sparse runs at "
        f"{sparse_bytes / 1e6 / median(sparse):.1f} GB/s of these, dense with heads folded at "
        f"{dense_bytes / 1e6 / median(took['folded']):.1f} GB/s."
    )
    return lines, note


def prefill(sizes: Sizes, q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """One layer's prompt through a growing cache, ``chunk`` tokens at a time."""
    layer, rows, out = MobaCacheLayer(), Rows(1), []
    for part in zip(*(x.split(chunk, dim=2) for x in (q, k, v)), strict=True):
        keys, values = layer.update(part[1], part[2], sizes.pattern.block_size, rows)
        segments = rows.segments(keys.shape[2], layer.room, q.device)
        routes = route(part[0], layer.centroids(rows), sizes.pattern, segments)
        out.append(attend(part[0], keys, values, pattern=sizes.pattern, routes=routes, segments=segments))
    return torch.cat(out, dim=2)


def prefill_lines(sizes: Sizes, length: int, chunk: int, rounds: int) -> Iterator[Line]:
    """A prompt in chunks against the same at once."""
    q, k, v = (sizes.draw(heads, length) for heads in (sizes.query_heads, sizes.key_heads, sizes.key_heads))
    prefill(sizes, q[:, :, : 2 * chunk], k[:, :, : 2 * chunk], v[:, :, : 2 * chunk], chunk)
    chunked, whole = [], []
    for _ in range(rounds):
        whole.append(1e3 * seconds(lambda: (prefill(sizes, q, k, v, length), None)[1]))
        chunked.append(1e3 * seconds(lambda: (prefill(sizes, q, k, v, chunk), None)[1]))
    yield Line(
        f"a prompt of {_tokens(length)} by {_tokens(chunk)}, one layer", "at once", chunked, whole, Bound("<=", 1.3)
    )


def _tokens(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def run(
    console: Console,
    rounds: int,
    json_path: Path | None,
    markdown: Path | None,
    dry_run: bool,
    sizes: Sizes = Sizes(),
    scale: int = 1,
) -> list[Verdict]:
    """The suite: prints its table, and writes it where asked; ``scale`` divides all lengths, for tests.

    Returns the verdict on every bound.
    """
    long, short, prompt, chunk = (1024 * n // scale for n in (128, 16, 64, 4))
    if dry_run:
        console.print(f"would time a token against caches of {_tokens(short)} and {_tokens(long)} tokens")
        console.print(f"would time a prompt of {_tokens(prompt)} tokens at once and by {_tokens(chunk)}")
        return []
    torch.manual_seed(0)
    with torch.inference_mode():
        lines, note = decode_lines(sizes, long, short, 3 * rounds, repeats=3)
        lines += prefill_lines(sizes, prompt, chunk, max(2, rounds - 1))
    table = Table(*HEADER)
    for line in lines:
        table.add_row(*line.cells())
    console.print(table)
    console.print(note)
    about = machine()
    console.print(described(about))
    if json_path is not None:
        rows: list[dict[str, Any]] = [
            {**vars(line), **vars(line.verdict), "ratio": median(line.ratios)} for line in lines
        ]
        write_whole(json_path, json.dumps({"machine": about, "results": rows, "note": note}, indent=1) + "\n")
    if markdown is not None:
        write_whole(markdown, _page(lines, note, about, sizes))
    return [line.verdict for line in lines]


def _page(lines: list[Line], note: str, about: dict[str, str], sizes: Sizes) -> str:
    """The page docs/benchmarks/decode.md."""
    pattern = sizes.pattern
    words = [
        f"Batch 1, {sizes.layers} layers, {sizes.query_heads} query and {sizes.key_heads} key heads, head dim "
        f"{sizes.head_dim}, float32, block {pattern.block_size}, top {pattern.top_k}, random inputs, so that a group's",
        "heads choose different blocks. A token's time is that of the cache's update, the gate and attention in all",
        "layers; the dense rivals only attend. Times are medians; a ratio is the median over paired rounds, the range",
        "its extremes.",
    ]
    rows = [line.cells() for line in lines]
    return bench_page("Decoding and chunked prefill on a CPU", "decode", about, words, HEADER, rows, [note])
