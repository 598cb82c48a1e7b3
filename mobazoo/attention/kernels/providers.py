"""The varlen kernels there are on CUDA, and which one is used."""

from __future__ import annotations

import inspect
import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mobazoo.attention.kernels.fit import Fitted, Provider
from mobazoo.attention.kernels.sequences import Sequences
from mobazoo.errors import InputError, UnsupportedError

log = logging.getLogger("mobazoo.attention")

AUTO = "auto"
NAMES = ("wheel", "aten")  # in order of preference

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_OLDEST_GPU = (8, 0)
_EXTRA = "install mobazoo[flash]"
# Looked up once, here, because neither can be while a model is compiled. The extension module is what tells
# flash-attn 2 from its successors, which share the name of the package.
_HAS_WHEEL = find_spec("flash_attn_2_cuda") is not None
_HAS_ATEN = torch.version.cuda is not None and torch.backends.cuda.is_flash_attention_available()


class Aten:
    """PyTorch's own copy of FlashAttention-2, ``aten::_flash_attention_forward`` and ``_backward``."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, runs: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        """See ``Provider``."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *runs[:4], 0.0, runs.causal, False, scale=scale)
        return out, _unpadded(lse, q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Sequences, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Provider``."""
        # Without dropout the state of the random numbers is not read, but the operator wants tensors.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, *runs[:4], 0.0, runs.causal, state, unused, scale=scale
        )
        return dq, dk, dv


class Wheel:
    """The flash-attn 2 package. Its functions are private and differ by release; what they take is found by looking.

    2.6 returns eight values and takes the window as a pair; 2.7 and 2.8 return four, take it as two numbers, and are
    custom operators, whose Python signature says nothing.

    Args:
        interface: the module ``flash_attn.flash_attn_interface``.
    """

    def __init__(self, interface: ModuleType) -> None:
        self._forward = interface._flash_attn_varlen_forward
        self._backward = interface._flash_attn_varlen_backward
        pair = "window_size" in inspect.signature(self._backward).parameters
        self._window = {"window_size": (-1, -1)} if pair else {"window_size_left": -1, "window_size_right": -1}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, runs: Sequences, scale: float) -> tuple[Tensor, Tensor]:
        """See ``Provider``."""
        results = self._forward(q, k, v, *runs[:4], 0.0, scale, runs.causal)
        if len(results) == 8:
            out, _, _, _, _, lse, _, _ = results
        elif len(results) == 4:
            out, lse, _, _ = results
        else:
            raise UnsupportedError(
                f"flash provider 'wheel': this flash-attn returns {len(results)} values from its varlen forward, "
                "known are 8 (2.6) and 4 (2.7, 2.8); install flash-attn>=2.6,<3 or use provider 'aten'"
            )
        return out, _unpadded(lse, q)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Sequences, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Provider``."""
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        self._backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            dq,
            dk,
            dv,
            *runs[:4],
            0.0,
            scale,
            runs.causal,
            **self._window,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq, dk, dv


def _unpadded(lse: Tensor, q: Tensor) -> Tensor:
    if lse.shape != (q.shape[1], q.shape[0]):
        raise UnsupportedError(
            f"flash: the kernel gave a log-sum-exp of {list(lse.shape)}, want [H, Q] = {[q.shape[1], q.shape[0]]}; "
            "flash-attn before 2.6 pads it by sequence: install flash-attn>=2.6,<3"
        )
    return lse


def unsupported(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no provider can do this on ``device`` (cuda), or None. Traceable by ``torch.compile``."""
    if device != "cuda":
        return f"flash has no kernel for {device}"
    if dtype not in _DTYPES:
        return f"flash on CUDA computes in float16 and bfloat16 only, got {dtype}"
    if head_dim > _MAX_HEAD_DIM:
        return f"flash on CUDA takes head dims up to {_MAX_HEAD_DIM}, got {head_dim}"
    if not _HAS_WHEEL and not _HAS_ATEN:
        return f"this PyTorch was built without CUDA flash kernels and flash-attn 2 is not installed ({_EXTRA})"
    if _too_old():
        return "flash on CUDA needs an NVIDIA GPU of compute capability 8.0 or newer"
    return None


def choose(device: str, dtype: torch.dtype, head_dim: int) -> tuple[str | None, str]:
    """The provider used by default and why, or None and why there is none. Imports flash-attn where it is installed."""
    reason = unsupported(device, dtype, head_dim)
    if reason is not None:
        return None, reason
    why: list[str] = []
    for name in NAMES:
        missing = absent(name)
        if missing is None:
            return name, "; ".join([*why, f"{name} is there"])
        why.append(missing)
    return None, "; ".join(why)


def absent(name: str) -> str | None:
    """Why a provider cannot be had in this installation, or None."""
    if name == "aten":
        return None if _HAS_ATEN else "aten: this PyTorch was built without CUDA flash kernels"
    if name == "wheel":
        loaded = _load_wheel() if _HAS_WHEEL else f"wheel: flash-attn 2 is not installed ({_EXTRA})"
        return loaded if isinstance(loaded, str) else None
    raise InputError(f"flash: unknown provider {name!r}; known: {AUTO}, {', '.join(NAMES)}")


def get(name: str, device: str, dtype: torch.dtype, head_dim: int) -> Provider:
    """The provider called ``name``, or by default (``auto``).

    Raises:
        InputError: no such name.
        UnsupportedError: it is not there, or no provider can do this.
    """
    if name == AUTO:
        chosen, reason = choose(device, dtype, head_dim)
    else:
        chosen, reason = name, absent(name) or unsupported(device, dtype, head_dim) or ""
    if chosen is None or (name != AUTO and reason):
        raise UnsupportedError(f"flash: no kernel provider: {reason}")
    wheel = _load_wheel() if chosen == "wheel" else None
    return Fitted(wheel if isinstance(wheel, Wheel) else Aten())


@cache
def _load_wheel() -> Wheel | str:
    """The wheel's kernels, or why there are none: one built for another PyTorch is common."""
    try:
        interface = import_module("flash_attn.flash_attn_interface")
    except ImportError as error:
        reason = f"wheel: flash-attn is installed but does not import ({error}); rebuild it for this PyTorch"
        log.warning("%s", reason)
        return reason
    return Wheel(interface)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _too_old() -> bool:
    return torch.cuda.get_device_capability() < _OLDEST_GPU
