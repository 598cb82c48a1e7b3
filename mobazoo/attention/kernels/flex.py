"""FlexAttention, always compiled: run eagerly it ignores the tile lists and builds the T x S scores."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._inductor.exc import InductorError
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from mobazoo.attention.native import compiler
from mobazoo.attention.problem import Problem

log = logging.getLogger("mobazoo.attention")

_Call = Callable[..., tuple[Tensor, Tensor | None]]
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Options of FlexAttention's kernels on CUDA, by compute capability, head dim and bytes of a number, where they were
# measured to be better than its own; `tools/gpu_report.sh --section flex` prints rows. No GPU has been measured yet.
TUNED: dict[tuple[str, int, int], dict[str, int]] = {}

# Variants of one configuration; a new one takes seconds.
_VARIANTS = 256

# Fewer queries are computed by another kernel, with tiles of its own.
_MANY = 128

# Triton multiplies tiles of at least 16; wider heads than 256 have no tuned configuration.
_CUDA_HEAD_DIMS = range(16, 257)


def unsupported(problem: Problem) -> str | None:
    """What keeps compiled FlexAttention from a problem, with what to use instead."""
    if problem.device not in ("cpu", "cuda"):
        return f"FlexAttention is compiled for CPUs and CUDA only, not for {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"FlexAttention computes in float32, float16 and bfloat16, not in {problem.dtype}"
    tracing = torch.compiler.is_compiling()  # cannot look for tools, and has them if it gets anywhere
    if problem.device == "cuda":
        if problem.head_dim not in _CUDA_HEAD_DIMS:
            return f"FlexAttention needs a head dim of 16 to 256 on CUDA, got {problem.head_dim}"
        return None if tracing else _missing("cuda")
    if problem.grad:
        return "FlexAttention has no backward on a CPU; detach q, k and v or use torch.no_grad()"
    return None if tracing else _missing("cpu")


@cache
def _missing(device: str) -> str | None:
    """What this machine lacks to compile FlexAttention, found out once."""
    if device == "cuda":
        return None if find_spec("triton") else "FlexAttention needs the package triton on CUDA"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return f"FlexAttention needs AVX2 on a CPU, this one has {capability}"
    if shutil.which(compiler()) is None:
        return f"FlexAttention needs a C++ compiler on a CPU and {compiler()!r} is not there; install it or set CXX"
    return None


def flex(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, *, want_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention under a block mask; a query that reads nothing gives zeros and a log-sum-exp of ``-inf``.

    Args:
        q: ``[B, Hq, T, D]``.
        k: ``[B, Hkv, S, D]``, never repeated or copied; ``Hq`` a multiple of ``Hkv``.
        v: ``[B, Hkv, S, D]``.
        mask: for ``T`` queries and ``S`` keys, with the lists by key tile if a backward may follow.
        scale: of the scores.
        want_lse: also return the natural log-sum-exp, float32 ``[B, Hq, T]`` (not on a CPU).
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _run(q, k, v, mask, scale, want_lse)
    with torch.no_grad():  # one variant for inference; on a CPU leaves are refused even so
        return _run(q.detach(), k.detach(), v.detach(), mask, scale, want_lse)


def _run(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    if torch.compiler.is_compiling():
        out, lse = _call(q, k, v, mask, scale, want_lse)
        return (torch.ops.mobazoo.unfused(out) if out.device.type == "cpu" else out), lse
    (batch, hq, length, dim), (_, hkv, slots, _) = q.shape, k.shape
    # All that a compilation is for: what FlexAttention or the compiler fix, and which sizes are 1 or the same.
    key = (
        *(q.device, q.dtype, hq, hkv, dim, scale, want_lse, q.requires_grad, k.requires_grad, v.requires_grad),
        *sorted((_options(q) or {}).items()),
        *(mask.BLOCK_SIZE, mask.mask_mod.__code__, *_constants(mask), mask.kv_indices.shape[1] == 1, length == slots),
        *(n == 1 for n in (batch, length, slots, *mask.kv_indices.shape[2:])),
    )
    return _compiled(q.device.type == "cpu", key)(q, k, v, mask, scale, want_lse)


def _call(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, want_lse: bool
) -> tuple[Tensor, Tensor | None]:
    options: Any = _options(q)
    if not want_lse:
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options), None
    out, aux = flex_attention(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options, return_aux=AuxRequest(lse=True)
    )
    return out, aux.lse


def _options(q: Tensor) -> dict[str, int] | None:
    if q.device.type == "cpu":
        # A partition smaller than a tile keeps the CPU from its decoding kernel, which returns uninitialised memory for
        # queries that read nothing.
        return {"PARTITION_SIZE": 1}
    if not TUNED or q.shape[2] < _MANY:
        return None
    return TUNED.get((_capability(q.device.index), q.shape[3], q.element_size()))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(index: int | None) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


def _constants(mask: BlockMask) -> tuple[int, ...]:
    """Host numbers that the token mask was built for, which are compiled into it."""
    cells = (cell.cell_contents for cell in mask.mask_mod.__closure__ or ())
    return tuple(value for value in cells if isinstance(value, int))


@torch.library.custom_op("mobazoo::unfused", mutates_args=())
def _unfused(x: Tensor) -> Tensor:
    """A copy that keeps the compiler from fusing what follows into FlexAttention's CPU kernel, which cannot."""
    return x.clone()


@_unfused.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@cache
def _compiled(on_cpu: bool, key: tuple[object, ...]) -> _Compilation:
    """The compilation of one key."""
    return _Compilation(on_cpu, key)


class _Compilation:
    """One configuration, compiled for any length at once on a CPU.

    The compiler counts variants by code object and after eight of them falls back to eager, that is to dense
    attention, or fails: eight layers that differ would do. So each configuration has its own copy of the code. On
    CUDA lengths become variables at the second one, because kernels for a fixed multiple of 128, as training has, do
    without bounds checks.

    Layouts, the width of ``Routes`` and sizes that happen to be equal are variants of one configuration. They may be
    more than the compiler's eight, so it is asked again with room for them.

    The CPU template of torch 2.13 puts sizes in by searching its text for their names, and takes a ``ks13`` for
    ``ks1`` and a ``3``. Where that happens to a configuration, each of its lengths is compiled by itself.
    """

    def __init__(self, on_cpu: bool, key: tuple[object, ...]) -> None:
        self._on_cpu = on_cpu
        self._any_length: _Call | None = _own(key, dynamic=True if on_cpu else None)
        self._key = key
        self._by_length: dict[tuple[int, ...], _Call] = {}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, want_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self._any_length is not None:
            try:
                return self._any_length(q, k, v, mask, scale, want_lse)
            except FailOnRecompileLimitHit:
                with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
                    return self._any_length(q, k, v, mask, scale, want_lse)
            except InductorError as error:
                if not self._on_cpu:
                    raise
                log.warning("flex: torch cannot compile this for any length (%s); compiling each", type(error).__name__)
                self._any_length = None
        lengths = (*q.shape, *k.shape[2:], *q.stride(), *k.stride(), *v.stride(), *mask.kv_indices.shape)
        if lengths not in self._by_length:
            self._by_length[lengths] = _own((*self._key, *lengths), dynamic=False)
        return self._by_length[lengths](q, k, v, mask, scale, want_lse)


def _own(key: tuple[object, ...], dynamic: bool | None) -> _Call:
    """``_call`` compiled, with a code object of its own."""
    own = FunctionType(_call.__code__.replace(co_name=f"_call_{hash(key)}"), _call.__globals__, "_call")
    return torch.compile(own, dynamic=dynamic, fullgraph=True)
