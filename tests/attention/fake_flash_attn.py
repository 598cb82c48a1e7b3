"""Modules with the private functions of flash-attn 2.6 and 2.8, signatures as released, computing the real thing.

The checks are those of the package's C++ entry points; results come from the stub.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mobazoo.attention.kernels.sequences import Sequences
from tests.attention.varlen_stub import Stub

NAME = "flash_attn.flash_attn_interface"


def check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int) -> None:
    """What ``mha_varlen_fwd`` and ``mha_varlen_bwd`` refuse."""
    for x in (q, k, v):
        assert x.dtype in (torch.float16, torch.bfloat16)
        assert x.stride(-1) == 1
        assert x.stride(0) % 8 == 0
    for cu in (cu_q, cu_k):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
    assert q.shape[2] % 8 == 0
    assert q.shape[2] <= 256
    assert q.shape[1] % k.shape[1] == 0
    # With one query a run, groups are moved into the queries: `q.reshape({batch_size, num_heads_k, ngroups, ...})`.
    assert max_q > 1 or q.shape[1] == k.shape[1] or q.shape[0] == cu_q.shape[0] - 1


def attend(q: Tensor, k: Tensor, v: Tensor, runs: Sequences, scale: float) -> tuple[Tensor, Tensor]:
    check(q, k, v, runs.cu_q, runs.cu_k, runs.max_q)
    return Stub().forward(q, k, v, runs, scale)


def differentiate(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Sequences, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    check(q, k, v, runs.cu_q, runs.cu_k, runs.max_q)
    assert dout.shape == out.shape == q.shape
    assert lse.is_contiguous()
    return Stub().backward(dout, q, k, v, out, lse, runs, scale)


def release_2_6() -> ModuleType:
    """Plain functions; the forward returns eight values, the window is a pair."""

    def _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
    ):
        assert dropout_p == 0.0
        assert window_size == (-1, -1)
        runs = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        out, lse = attend(q, k, v, runs, softmax_scale)
        return out, q, k, v, out, lse, None, torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert (dropout_p, window_size, softcap, alibi_slopes) == (0.0, (-1, -1), 0.0, None)
        runs = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        grads = differentiate(dout, q, k, v, out, softmax_lse, runs, softmax_scale)
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            given.copy_(grad)
        return dq, dk, dv, torch.empty(0)

    return _module(_flash_attn_varlen_forward, _flash_attn_varlen_backward)


@torch.library.custom_op("mobazoo_tests::_flash_attn_varlen_forward", mutates_args=())
def _forward_2_8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert (dropout_p, window_size_left, window_size_right) == (0.0, -1, -1)
    runs = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    out, lse = attend(q, k, v, runs, softmax_scale)
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


@torch.library.custom_op("mobazoo_tests::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _backward_2_8(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    runs = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
    grads = differentiate(dout, q, k, v, out, softmax_lse, runs, softmax_scale)
    for given, grad in zip((dq, dk, dv), grads, strict=True):
        assert given is not None
        given.copy_(grad)
    return torch.empty(0)


def release_2_8() -> ModuleType:
    """Custom operators; the forward returns four values, the window is two numbers, gradients are filled in."""
    return _module(_forward_2_8, _backward_2_8)


def _module(forward: object, backward: object) -> ModuleType:
    module = ModuleType(NAME)
    module._flash_attn_varlen_forward = forward  # type: ignore[attr-defined]
    module._flash_attn_varlen_backward = backward  # type: ignore[attr-defined]
    return module
