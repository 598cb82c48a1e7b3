"""``mobazoo bench RECIPE`` for attention alone: MoBA by backends and its rivals in turn, over lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mobazoo.attention import Full, MoBA, Segments, attend, centroids, route
from mobazoo.attention.backends import BACKENDS
from mobazoo.attention.blockmask import tile_density
from mobazoo.bench.limits import Limits, available, peak_of
from mobazoo.bench.points import Point
from mobazoo.bench.ratios import speedup
from mobazoo.checkpoint.ready import usable
from mobazoo.config.keys import nearest
from mobazoo.config.rules import LayerAttention
from mobazoo.config.sweep import SweepRecipe
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.explain import share_read
from mobazoo.extras import require
from mobazoo.parts import Parts
from mobazoo.results import lasting, machine, write_result

Progress = Callable[[str, int, int], None]
Call = Callable[[], Any]

_PILOT = 1024  # tokens of the first call of each, which tells how long the next may take
_TILE_PAIRS = 1 << 26  # more tiles are not counted
_SHORT = 0.05  # seconds; shorter calls are repeated, or the clock decides


def check_backends(recipe: SweepRecipe) -> None:
    """Names and the device, which need torch.

    Raises:
        InputError: an unknown backend, or no such device here.
    """
    for name in recipe.backends:
        if name not in ("auto", *BACKENDS):
            raise InputError(f"bench.backends: unknown backend {name!r}; {nearest(name, ('auto', *BACKENDS))}")
    usable(recipe.device, "bench.device")


def time_sweep(recipe: SweepRecipe, progress: Progress) -> dict[str, Any]:
    """Times every point of the recipe.

    Each round calls all contenders in turn, and a ratio belongs to its round. What does not fit, would take too long or
    cannot compute a point is left out of it, and the reason stands in its place. With ``dest`` every point is kept as
    soon as it is measured, and the same call goes on after an interruption.

    Returns:
        ``sweep``: a row for each point with ``runs``: ``name``, ``seconds`` of each round, ``median_s``, ``peak_bytes``
        (beyond the inputs; None where the system does not say), ratios to the first rival that was timed
        (``against``), or ``skipped``.

    Raises:
        InputError: a recipe that cannot be used, nothing in it that fits, or points of another recipe, machine or
            version kept beside ``dest``.
    """
    recipe.check()
    check_backends(recipe)
    points = [
        Point(recipe, mode, dtype, blocks, length)
        for mode, dtype, blocks in product(recipe.modes, recipe.dtypes, recipe.blocks)
        for length in sorted(recipe.lengths)
    ]
    limits, rows = Limits(recipe.longest), []
    device, parts = usable(recipe.device), Parts(recipe.dest, recipe, about=lasting(machine()))
    for number, point in enumerate(points):
        progress("attention", number, len(points))
        row = parts.get(f"row {number}", partial(_row, point, device, limits))
        for run in row["runs"]:
            if "median_s" in run:
                limits.learn(point, run["name"], run["median_s"])
        rows.append(row)
    progress("attention", len(points), len(points))
    if all("skipped" in run for row in rows for run in row["runs"]):
        parts.done()
        raise InputError(f"bench: nothing of it could be timed; {rows[0]['runs'][0]['skipped']}")
    found = {"sweep": rows}
    if recipe.dest is not None:
        write_result(recipe.dest, "bench", recipe, found)
        parts.done()
    return found


def _row(point: Point, device: str, limits: Limits) -> dict[str, Any]:
    names = [*point.recipe.against, *(f"MoBA, {name}" for name in point.recipe.backends)]
    free = available(device) if point.recipe.memory is None else int(point.recipe.memory * 2**30)
    skipped = dict[str, str]()
    for name in names:
        why = _too_large(point, name, free) or _tried(point, name, device, limits) or limits.too_slow(point, name)
        skipped |= {name: why} if why else {}
    able = [name for name in names if name not in skipped]
    timed, peaks, density = dict[str, list[float]](), dict[str, int | None](), None
    if able:
        tensors = inputs(point, device)
        calls = {name: contender(name, point, tensors) for name in able}
        for name in able:
            why, peaks[name] = _first_call(calls[name], device)
            if why is not None:
                skipped[name] = why
                del calls[name]
        timed, density = _rounds(calls, point.recipe.rounds, device), _density(point, tensors)
    first = next((rival for rival in point.recipe.against if rival in timed), None)
    return {
        **point.said(),
        "share_read": float(share_read([LayerAttention(point.pattern)], point.length)),
        "tile_density": density,
        "runs": [
            {"name": name, "skipped": skipped[name]}
            if name in skipped
            else {"name": name, **_figures(timed, name, first), "peak_bytes": peaks[name]}
            for name in names
        ],
    }


def _figures(timed: Mapping[str, list[float]], name: str, first: str | None) -> dict[str, Any]:
    took = timed[name]
    found: dict[str, Any] = {"seconds": took, "median_s": median(took)}
    if first is not None and name != first:
        found |= {"against": first, **speedup(timed[first], took)}
    return found


def _too_large(point: Point, name: str, free: int | None) -> str | None:
    need = point.bytes_needed(name)
    if free is None or need <= free:
        return None
    return f"needs about {need / 2**30:.3g} GiB, there are {free / 2**30:.3g} GiB"


def _tried(point: Point, name: str, device: str, limits: Limits) -> str | None:
    """A call at a short length where nothing is known of a contender yet; why it cannot, if so."""
    if not limits.unknown(point, name):
        return None
    pilot = point.at(min(_PILOT, point.length))
    try:
        call = contender(name, pilot, inputs(pilot, device))
    except UnsupportedError as error:
        return str(error)
    why, _ = _first_call(call, device)
    if why is not None:
        return why
    limits.learn(pilot, name, min(clocked(call, device) for _ in range(2)))
    return None


def _first_call(call: Call, device: str) -> tuple[str | None, int | None]:
    """Why it failed, where that says something about the machine or the backend; else the bytes it took."""
    try:
        return None, peak_of(call, device)
    except UnsupportedError as error:
        return str(error), None
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return "ran out of memory", None
        raise


def _rounds(calls: Mapping[str, Call], rounds: int, device: str) -> dict[str, list[float]]:
    repeats = {name: max(1, min(20, int(_SHORT / max(clocked(call, device), 1e-6)))) for name, call in calls.items()}
    timed: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            timed[name].append(median(clocked(call, device) for _ in range(repeats[name])))
    return timed


def clocked(call: Call, device: str) -> float:
    """Seconds of one call, the device's work included."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    begin = perf_counter()
    call()
    wait()
    return perf_counter() - begin


def inputs(point: Point, device: str) -> list[Tensor]:
    """q, k, v and, for ``train``, the output's gradient: random, so that no two queries agree."""
    recipe = point.recipe
    source = torch.Generator(device).manual_seed(0)
    made = {"dtype": getattr(torch, point.dtype), "device": device, "generator": source}
    queries = 1 if point.mode == "decode" else point.length
    q = torch.randn(recipe.batch, recipe.query_heads, queries, recipe.head_dim, **made)
    k, v = (torch.randn(recipe.batch, recipe.key_heads, point.length, recipe.head_dim, **made) for _ in range(2))
    if point.mode != "train":
        return [q, k, v]
    return [*(x.requires_grad_() for x in (q, k, v)), torch.randn(q.shape, **made)]


def contender(name: str, point: Point, tensors: list[Tensor]) -> Call:
    """The work of a rival, or of MoBA by a backend (``MoBA, auto``)."""
    q, k, v, *dout = tensors
    compute = _computes(name, point, q, k)

    def call() -> None:
        with torch.set_grad_enabled(bool(dout)):
            out = compute(q, k, v)
            if dout:
                torch.autograd.grad(out, (q, k, v), dout[0])

    return call


def _computes(name: str, point: Point, q: Tensor, k: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if name == "sdpa":
        return lambda q, k, v: attend(q, k, v, pattern=Full(), backend="sdpa")
    if name == "flash-attn":
        require("flash_attn", "bench.against: flash-attn", "mobazoo[flash]")
        flash = import_module("flash_attn").flash_attn_func
        return lambda q, k, v: flash(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)
    backend = "reference" if name == "naive" else name.removeprefix("MoBA, ")
    pattern = point.pattern
    if point.mode != "decode" or pattern.covers(point.length):
        return lambda q, k, v: attend(q, k, v, pattern=pattern, backend=backend)
    segments = Segments.single(q.shape[0], point.length, q.device)
    known = centroids(k, pattern.block_size, segments)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        routes = route(q, known, pattern, segments)
        return attend(q, k, v, pattern=pattern, backend=backend, segments=segments, routes=routes)

    return step


@torch.no_grad()
def _density(point: Point, tensors: list[Tensor]) -> float | None:
    """Share of the causal tiles that blocks touch, of the first row's first head; None where they are too many."""
    pattern: MoBA = point.pattern
    if point.mode == "decode" or (point.length // 128) ** 2 > _TILE_PAIRS or pattern.covers(point.length):
        return None
    q, k = tensors[0][:1, :1], tensors[1][:1, :1]
    segments = Segments.single(1, point.length, q.device)
    routes = route(q, centroids(k, pattern.block_size, segments), pattern, segments)
    return float(tile_density(routes, segments, point.length))
