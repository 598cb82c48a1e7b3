"""Every backend against the float64 oracle, forward and backward, on routes that no gate chose."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from mobazoo.attention import Routes, attend
from tests.attention.parity.cases import CORE_FULL, CORE_SPARSE, FEW, FULL, SPARSE
from tests.factories import Case, Inputs, chosen_by, gate_routes, inputs, oracle, random_routes, run
from tests.marks import DTYPES, INTERPRETED, able, on_backends, trains
from tests.oracle import Attention
from tests.tolerance import Result, check


@cache
def truth(case: Case, dtype: torch.dtype, device: str) -> tuple[Inputs, Routes | None, Attention, Result]:
    """Inputs, routes, the oracle and the reference backend's result: the same for every backend that is checked."""
    data = inputs(case, dtype, device)
    routes, chosen = random_routes(case) if case.block_size else (None, [])
    expected = oracle(case, data, chosen).settled()
    return data, routes, expected, run(case, data, "reference", routes=routes, grad=True)


def _check(case: Case, dtype: torch.dtype, backend: str, device: str, *, grad: bool) -> None:
    case = FEW.get(case, case) if backend == "decode" else case
    data, routes, expected, reference = truth(case, dtype, device)
    result = run(case, data, backend, routes=routes, grad=grad)
    check(result, expected, reference, backend)
    assert result.out.dtype == dtype
    assert all(g.dtype == dtype for g in result.gradients)


@on_backends(SPARSE, DTYPES, core=CORE_SPARSE)
def test_forward_sparse(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    _check(case, dtype, backend, device, grad=False)


@on_backends(FULL, DTYPES, core=CORE_FULL)
def test_forward_full(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    _check(case, dtype, backend, device, grad=False)


@on_backends(SPARSE, DTYPES, core=CORE_SPARSE, grad=True)
def test_backward_sparse(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    _check(case, dtype, backend, device, grad=True)


@on_backends(FULL, DTYPES, core=CORE_FULL, grad=True)
def test_backward_full(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    _check(case, dtype, backend, device, grad=True)


@pytest.mark.parametrize("name", ["b7k3", "b64k50", "middle"])
def test_reference_is_near_the_oracle(name: str) -> None:
    """The other budgets lean on the reference's error, so that one needs a bound of its own: float64's."""
    data, _, expected, reference = truth(SPARSE[name], torch.float64, "cpu")
    check(reference, expected, reference)
    assert (reference.out - expected.out).abs().max() < 1e-13
    assert data.q.dtype == torch.float64


SCALED = {"sparse": SPARSE["b7k3"], "full": FULL["4to2d33"], "whole": FULL["whole"], "decode": FULL["decode"]}


@on_backends(SCALED, core=("sparse",))
def test_scale(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    data, routes, _, _ = truth(case, dtype, device)
    chosen = random_routes(case)[1] if case.block_size else []
    expected = oracle(case, data, chosen, scale=0.31)
    grad = trains(case, dtype, backend, device)
    result, reference = (run(case, data, name, routes=routes, grad=grad, scale=0.31) for name in (backend, "reference"))
    check(result, expected, reference, backend)


LAYOUTS = {
    "tokens_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice_of_more": lambda x: torch.stack([x.new_zeros(()).expand_as(x), x], dim=-2).flatten(-2)[..., x.shape[-1] :],
    "every_other_token": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "dims_first": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@on_backends(
    {"sparse": SPARSE["b7k3"], "full": FULL["4to2d33"], "whole": FULL["whole"]},
    (torch.float32, torch.bfloat16),
    core=("sparse",),
)
def test_not_contiguous(case: Case, dtype: torch.dtype, backend: str, device: str, layout: str) -> None:
    data, routes, expected, reference = truth(case, dtype, device)
    strided = data.map(LAYOUTS[layout])
    assert not strided.q.is_contiguous() or strided.q.storage_offset()
    assert torch.equal(strided.q, data.q)
    grad = trains(case, dtype, backend, device)
    check(run(case, strided, backend, routes=routes, grad=grad), expected, reference, backend)


@on_backends({"sparse": SPARSE["b7k3"], "full": FULL["4to2d33"]}, core=("sparse",), grad=True)
def test_expanded_output_gradient(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    """``out.sum().backward()`` hands kernels a gradient with no strides at all."""
    data, routes, _, _ = truth(case, dtype, device)
    ones = Inputs(*data.qkv, torch.ones((), dtype=dtype, device=device).expand_as(data.dout))
    expected = oracle(case, ones, random_routes(case)[1] if case.block_size else [])
    result, reference = (run(case, ones, name, routes=routes, grad=True) for name in (backend, "reference"))
    check(result, expected, reference, backend)


@pytest.mark.parametrize("backend", able(SPARSE["whole"], grad=True))
def test_gate_and_attention_together(backend: str) -> None:
    """Without routes ``attend`` is the gate followed by attention over what it chose."""
    case = SPARSE["whole"]
    data = inputs(case)
    expected = oracle(case, data, chosen_by(gate_routes(case, data.q, data.k)))
    result, reference = (run(case, data, name, grad=True) for name in (backend, "reference"))
    check(result, expected, reference, backend)


@pytest.mark.parametrize("needed", ["q", "k", "v"])
@pytest.mark.parametrize("backend", sorted({*able(SPARSE["whole"], grad=True)} - {*INTERPRETED}))
def test_one_gradient_at_a_time(backend: str, needed: str) -> None:
    """Frozen projections ask for some gradients only."""
    case = SPARSE["whole"]
    data, routes, expected, reference = truth(case, torch.float32, "cpu")
    leaves = {n: getattr(data, n).detach().requires_grad_(n == needed) for n in "qkv"}
    out = attend(**leaves, pattern=case.pattern, backend=backend, routes=routes)
    (gradient,) = torch.autograd.grad(out, leaves[needed], data.dout)
    at = "qkv".index(needed)
    grads = list(reference.gradients)
    grads[at] = gradient
    check(Result(out.detach(), tuple(grads)), expected, reference, backend)
