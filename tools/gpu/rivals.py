"""Who computes the GPU report's shapes: full attention, ours by blocks, public peers; what peers published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from mobazoo.attention import Routes, Segments, attend
from mobazoo.attention.backends import flash
from tools.gpu.shapes import Run, Shape, gate
from tools.gpu.verify import Routed

ATEN = "FlashAttention-2 (aten)"
TRITON = "triton"


@dataclass(frozen=True)
class Published:
    """A figure that a peer published, for the shape that a section measures."""

    who: str
    times: float
    hardware: str
    source: str


PUBLISHED = {
    "64k": Published("FlashMoBA", 5.6, "H100", "arXiv 2511.11571, against FlashAttention-2"),
    "512k": Published("FlashMoBA", 14.7, "H100", "arXiv 2511.11571, against FlashAttention-2"),
    "1m": Published("MoBA", 6.5, "hardware not named", "arXiv 2502.13189, against full attention, Llama-8B"),
}


def full(device: str) -> dict[str, Run]:
    """Full attention as others compute it; who is not installed says so when called."""
    if device == "cpu":
        return {"SDPA": partial(_sdpa, SDPBackend.MATH)}
    return {
        ATEN: _aten,
        "SDPA flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "flash-attn wheel": _wheel,
    }


def by_blocks(shape: Shape, *names: str) -> dict[str, Routed]:
    """Attention by blocks of the backends ``names``, the gate included where no routes are given."""

    def run(name: str, q: Tensor, k: Tensor, v: Tensor, routes: Routes | None) -> Tensor:
        return attend(q, k, v, pattern=shape.pattern, backend=name, routes=routes)

    return {name: partial(run, name) for name in names}


def flash_by(shape: Shape, provider: str) -> Routed:
    """The backend ``flash`` with one of its kernels, which refuses where it is not there."""

    def run(q: Tensor, k: Tensor, v: Tensor, routes: Routes | None) -> Tensor:
        segments = Segments.single(q.shape[0], q.shape[2], q.device)
        routes = gate(q, k, shape.pattern) if routes is None else routes
        scale = q.shape[3] ** -0.5
        return flash.run(q, k, v, segments=segments, routes=routes, q_start=0, scale=scale, provider=provider)

    return run


def peers(shape: Shape) -> dict[str, Run]:
    """Public implementations of the same, if they are installed; their results are not checked."""
    return {
        "FlashMoBA (flash_moba)": partial(_flash_moba, shape),
        "MoBA (moba)": partial(_moba, shape),
    }


def without_routes(run: Routed) -> Run:
    """A call that chooses its routes itself."""
    return lambda q, k, v: run(q, k, v, None)


def _sdpa(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _aten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = (x.transpose(1, 2) for x in (q, k, v))
    slots = q.shape[2]
    flash = torch.ops.aten._flash_attention_forward
    out = flash(*rows, None, None, slots, slots, 0.0, True, False, scale=q.shape[3] ** -0.5)[0]
    return out.transpose(1, 2)


def _wheel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    call = _found("flash_attn", "flash_attn_func")
    return call(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2)


def _flash_moba(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    call = _found("flash_moba", "flash_moba_varlen_func")
    ends, slots = _ends(q), q.shape[2]
    out = call(*map(_tokens, (q, k, v)), ends, ends, slots, slots, shape.block_size, shape.top_k, causal=True)
    return _rows(out, q)


def _moba(shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    call = _found("moba.moba_efficient", "moba_attn_varlen")
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))  # it knows no groups
    out = call(*map(_tokens, (q, k, v)), _ends(q), q.shape[2], shape.block_size, shape.top_k)
    return _rows(out, q)


def _found(module: str, name: str) -> Callable[..., Tensor]:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"not installed here ({error})") from None


def _tokens(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)  # [B, H, S, D] -> [B * S, H, D]


def _rows(out: Tensor, q: Tensor) -> Tensor:
    return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)


def _ends(q: Tensor) -> Tensor:
    return torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * q.shape[2]
