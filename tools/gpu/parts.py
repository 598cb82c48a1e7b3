"""Where the time of the Triton backend goes: its launches one by one, beside the least that each can take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from mobazoo.attention.kernels import triton_backward, triton_forward, triton_gate, triton_launch
from mobazoo.attention.kernels.triton_slabs import lists
from tools.gpu.count import Peak, parts
from tools.gpu.shapes import Shape

# Names of `count.parts`; sorting the lists is torch's work.
_KERNELS = {
    (triton_gate, "means"): "centroids",
    (triton_gate, "gate"): "gate",
    (triton_forward, "routed"): "forward, routed",
    (triton_forward, "own"): "forward, own",
    (triton_backward, "delta"): "backward, delta",
    (triton_backward, "queries_routed"): "dq, routed",
    (triton_backward, "queries_own"): "dq, own",
    (triton_backward, "keys"): "dk and dv",
}
_LISTS = "lists"


class Clock:
    """Adds up what calls take on the device, and sets no order between them: nothing is waited for until the end."""

    def __init__(self, device: str) -> None:
        self._gpu = device == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._now()
            result = call(*args, **kwargs)
            self._spans.append((name, begin, self._now()))
            return result

        return timed

    def seconds(self) -> dict[str, float]:
        """By name."""
        if self._gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for name, begin, end in self._spans:
            found[name] += begin.elapsed_time(end) / 1e3 if self._gpu else end - begin
        return dict(found)

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class _Launches:
    """A kernel whose launches are timed."""

    def __init__(self, kernel: Any, name: str, clock: Clock) -> None:
        self._kernel, self._name, self._clock = kernel, name, clock

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return self._clock.around(self._name, self._kernel[grid])


@contextmanager
def _watched(clock: Clock) -> Iterator[None]:
    with ExitStack() as stack:
        for (module, kernel), name in _KERNELS.items():
            stack.enter_context(patch.object(module, kernel, _Launches(getattr(module, kernel), name, clock)))
        stack.enter_context(patch.object(triton_launch, "lists", clock.around(_LISTS, lists)))
        yield


def seconds_by_part(work: Callable[[], Any], device: str) -> dict[str, float]:
    """Of one call of ``work``, which has run before; ``all`` is the whole call, and what no part took is the rest."""
    clock = Clock(device)
    with _watched(clock):
        clock.around("all", work)()
    return clock.seconds()


def floors(shape: Shape, peak: Peak) -> dict[str, dict[str, float]]:
    """Tensor operations, bytes and the least seconds of each part, lists of both ways together, and of ``all``."""
    found: dict[str, dict[str, float]] = {}
    whole = dict.fromkeys(("operations", "bytes", "seconds"), 0.0)
    for part in parts(shape):
        counted = {"operations": part.tensor, "bytes": part.bytes, "seconds": part.seconds(peak)}
        for total in (found.setdefault(part.name.removesuffix(" again"), dict.fromkeys(whole, 0.0)), whole):
            for what, value in counted.items():
                total[what] += value
    return {**found, "all": whole}
