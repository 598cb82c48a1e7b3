"""Which backends, devices and dtypes a test runs on: whatever this machine can, found and not listed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
import torch

from mobazoo.attention.backends import BACKENDS
from tests.factories import Case

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# Our Triton kernels are compiled where there is a GPU and interpreted where there is none: Triton decides once.
TRITON_ON = [pytest.param("cuda", marks=pytest.mark.gpu)] if "cuda" in DEVICES else [pytest.param("cpu")]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SINGLE = (torch.float32,)

# These compile for every geometry, which takes seconds to minutes: they get the cases of `core` in float32 only.
COMPILING = ("flex", "flex_routed")

# Interpreted on a CPU, where each case takes seconds: the cases of `core` in float32, marked slow. The default run has
# the small grid of test_triton.py instead.
INTERPRETED = ("triton",)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def able(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", *, grad: bool = False) -> list[str]:
    """Backends that do not refuse the case, the reference included."""
    problem = case.problem(dtype, device, grad=grad)
    return [name for name, module in BACKENDS.items() if module.unsupported(problem) is None]


def trains(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> bool:
    """Whether the backend has a backward here: forward-only backends keep their forward promises."""
    return backend in able(case, dtype, device, grad=True)


def on_backends(
    cases: Mapping[str, Case],
    dtypes: Iterable[torch.dtype] = SINGLE,
    *,
    grad: bool = False,
    core: Iterable[str] = (),
    reference: bool = True,
) -> pytest.MarkDecorator:
    """Parametrizes ``case, dtype, backend, device`` over everything that can run; ``core`` names the reduced set."""
    core, params = set(core), []
    assert core <= set(cases), "core must name cases"
    for name, case in cases.items():
        for device in DEVICES:
            for dtype in dtypes:
                for backend in able(case, dtype, device, grad=grad):
                    interpreted = backend in INTERPRETED and device == "cpu"
                    if (backend in COMPILING or interpreted) and (name not in core or dtype != torch.float32):
                        continue
                    if backend == "reference" and not reference:
                        continue
                    marks = [pytest.mark.gpu] if device == "cuda" else [pytest.mark.slow] if interpreted else []
                    ident = f"{name}-{name_of(dtype)}-{backend}-{device}"
                    params.append(pytest.param(case, dtype, backend, device, id=ident, marks=marks))
    return pytest.mark.parametrize("case, dtype, backend, device", params)
