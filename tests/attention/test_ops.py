"""The opaque operators keep the contract that ``torch.compile`` builds on: fakes, no aliasing, autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.factories import Case, gate_routes, inputs, segments_of

CASE = Case(((1, 30, -2, 1, 11), (-6, 39)), 7, 3, 4, 2, 8)
DTYPES = (torch.float32, torch.bfloat16)


def flash_arguments(dtype: torch.dtype, *, sparse: bool, grad: bool, tensor_start: bool = False) -> tuple[Any, ...]:
    data, segments = inputs(CASE, dtype), segments_of(CASE.rows)
    routes = gate_routes(CASE, data.q, data.k)
    return (
        *(x.requires_grad_(grad) for x in data.qkv),
        routes.index if sparse else None,
        routes.start if sparse else None,
        segments.doc,
        segments.pos,
        0,
        torch.tensor(0) if tensor_start else None,
        7 if sparse else 0,
        0.3,
        segments.max_docs,
        segments.max_len,
        segments.whole,
        "auto",
    )


@pytest.mark.parametrize("top_k", [0, 1, 4, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate(dtype: torch.dtype, top_k: int) -> None:
    q, mean = torch.randn(2, 4, 30, 8, dtype=dtype), torch.randn(2, 2, 9, 8, dtype=dtype)
    stop = torch.arange(30)[None].expand(2, 30) // 4
    torch.library.opcheck(torch.ops.mobazoo.gate, (q, mean, torch.zeros_like(stop), stop, top_k))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash(dtype: torch.dtype, sparse: bool, grad: bool) -> None:
    torch.library.opcheck(torch.ops.mobazoo.flash, flash_arguments(dtype, sparse=sparse, grad=grad))


def test_flash_with_a_start_in_a_tensor() -> None:
    torch.library.opcheck(
        torch.ops.mobazoo.flash, flash_arguments(torch.float32, sparse=True, grad=True, tensor_start=True)
    )


@pytest.mark.parametrize("sparse", [False, True], ids=["full", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flash_backward(dtype: torch.dtype, sparse: bool) -> None:
    arguments = flash_arguments(dtype, sparse=sparse, grad=False)
    out, lse = torch.ops.mobazoo.flash(*arguments)
    full = (torch.randn_like(out), *arguments[:3], out, lse, *arguments[3:])
    torch.library.opcheck(torch.ops.mobazoo.flash_backward, full)


def test_strided_inputs_match_their_fakes() -> None:
    """Outputs are contiguous whatever the inputs' strides: a fake that copied strides would mislead a compiler."""
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(CASE).qkv]
    rest = flash_arguments(torch.float32, sparse=True, grad=False)[3:]
    torch.library.opcheck(torch.ops.mobazoo.flash, (*strided, *rest))
    out, lse = torch.ops.mobazoo.flash(*strided, *rest)
    assert out.is_contiguous()
    assert lse.is_contiguous()
    torch.library.opcheck(torch.ops.mobazoo.flash_backward, (torch.randn_like(strided[0]), *strided, out, lse, *rest))
