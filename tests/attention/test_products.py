"""Gradients by matrix products: bfloat16 on a CPU, calls of many queries and few keys."""

from __future__ import annotations

import pytest
import torch

from mobazoo.attention.kernels import cpu, cpu_masked, cpu_products
from mobazoo.attention.kernels.cpu_products import Products, products_pay
from tests.attention.parity.cases import SPARSE
from tests.factories import Case, inputs, oracle, random_routes, run, spy
from tests.tolerance import check

# Runs of equal blocks, tails of them, documents of one block, padding; two calls for the readers of one block.
LONG = Case(((700, 65, -3, 200), (-10, 958)), 32, 4, 4, 2, 64)
STRIPS = Case(((900,),), 150, 2, 4, 2, 16)  # own blocks in strips of queries
CASES = {"long": LONG, "strips": STRIPS} | {name: SPARSE[name] for name in ("b1k2", "b7k3", "b64k3", "middle", "whole")}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call is too small, on any processor, and no document so short that it takes a mask."""
    monkeypatch.setattr(cpu_masked, "_pays", lambda *_: False)
    monkeypatch.setattr(cpu_products, "_LEAST_QUERIES", 1)
    monkeypatch.setattr(cpu_products, "_multiplies_bfloat16", lambda: True)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.setattr(cpu_products, "_SCORES", 64 * 64)  # several calls a block
    own, routed = (spy(monkeypatch, Products, name, lambda *_: 1) for name in ("own", "routed"))
    data, (routes, chosen) = inputs(case, torch.bfloat16), random_routes(case)
    reference = run(case, data, "reference", routes=routes, grad=True)
    check(run(case, data, "flash", routes=routes, grad=True), oracle(case, data, chosen), reference, "products")
    assert routed
    assert own or case.block_size == 1 or case.queries


@pytest.mark.usefixtures("always")
def test_a_call_has_only_so_many_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many query heads share a key head, and for own blocks as for routed ones."""
    monkeypatch.setattr(cpu_products, "_SCORES", 64 * 64)
    case = Case(((140,),), 35, 3, 14, 2, 16)
    calls = spy(monkeypatch, cpu_products, "_gradients", lambda given, _: given[0].numel() // 16 * given[3].shape[-2])
    data, (routes, chosen) = inputs(case, torch.bfloat16), random_routes(case)
    reference = run(case, data, "reference", routes=routes, grad=True)
    check(run(case, data, "flash", routes=routes, grad=True), oracle(case, data, chosen), reference, "products")
    assert max(calls) <= 64 * 64


@pytest.mark.usefixtures("always")
def test_a_common_part_of_the_values_costs_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all values share has no gradient; products must take it away before they round."""
    data, (routes, chosen) = inputs(LONG, torch.bfloat16), random_routes(LONG)
    data.v.detach().add_(16.0)
    truth = oracle(LONG, data, chosen).gradients[0]

    def error() -> float:
        (dq, *_) = run(LONG, data, "flash", routes=routes, grad=True).gradients
        return float((dq.double() - truth).norm() / truth.norm())

    ours = error()
    monkeypatch.setattr(cpu, "products_pay", lambda *_: False)
    assert ours <= 1.25 * error()


def test_only_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    most = cpu_products._MOST_KEYS
    monkeypatch.setattr(cpu_products, "_multiplies_bfloat16", lambda: True)
    assert products_pay(torch.bfloat16, queries=256, keys=most)
    assert not products_pay(torch.float32, queries=256, keys=most)
    assert not products_pay(torch.float16, queries=256, keys=most)
    assert not products_pay(torch.bfloat16, queries=255, keys=most)
    assert not products_pay(torch.bfloat16, queries=256, keys=most + 1)
    monkeypatch.setattr(cpu_products, "_multiplies_bfloat16", lambda: False)
    assert not products_pay(torch.bfloat16, queries=256, keys=most)


@pytest.mark.parametrize(
    ("built", "avx2", "avx512_bf16", "takes", "want"),
    [
        (True, True, True, True, True),
        (True, True, False, True, False),  # AVX-512 without instructions for bfloat16: oneDNN takes it all the same
        (True, False, False, True, True),  # Arm
        (True, False, False, False, False),
        (False, False, False, True, False),
    ],
)
def test_which_processors_multiply_bfloat16(
    built: bool, avx2: bool, avx512_bf16: bool, takes: bool, want: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> bool:
        assert built, "without oneDNN there is no such operator"
        return takes

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: built)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: avx2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", ask, raising=False)
    assert cpu_products._multiplies_bfloat16.__wrapped__() is want
