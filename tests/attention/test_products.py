"""Gradients by matrix products: bfloat16 on a CPU, calls of many queries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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
WIDE = Case(((3300,),), 1100, 2, 2, 1, 24)  # own blocks too large for strips, and a scale that is no power of two
CASES = {"long": LONG, "strips": STRIPS, "wide": WIDE} | {
    name: SPARSE[name] for name in ("b1k2", "b7k3", "b64k3", "middle", "whole")
}


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
    assert own or case.block_size in (1, WIDE.block_size) or case.queries


@pytest.mark.usefixtures("always")
def test_a_call_has_only_so_many_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many query heads share a key head, and for own blocks as for routed ones."""
    monkeypatch.setattr(cpu_products, "_SCORES", 64 * 64)
    case = Case(((140,),), 35, 3, 14, 2, 16)

    def own(given: tuple[Any, ...], _: object) -> int:
        _, tile, _, heads = given
        return tile.count * tile.q_len * tile.k_len * (heads.stop - heads.start)

    def routed(given: tuple[Any, ...], _: object) -> int:
        _, rows, block = given
        return len(rows) * (block.stop - block.start)

    own_calls, routed_calls = spy(monkeypatch, Products, "_own", own), spy(monkeypatch, Products, "_routed", routed)
    data, (routes, chosen) = inputs(case, torch.bfloat16), random_routes(case)
    reference = run(case, data, "reference", routes=routes, grad=True)
    check(run(case, data, "flash", routes=routes, grad=True), oracle(case, data, chosen), reference, "products")
    assert max(own_calls) <= 64 * 64
    assert max(routed_calls) <= 64 * 64


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


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("dim", [8, 24, 64])  # 24 ** -0.5 is no power of two
def test_nothing_is_rounded_in_an_exponent(dim: int) -> None:
    """Large scores, one certain and one hopeless: weights are as good as rounding them alone leaves them."""
    torch.manual_seed(0)
    readers, keys, scale = 192, 16, dim**-0.5
    q, k = (10 * torch.randn(n, dim).bfloat16() for n in (readers, keys))
    scores = q.double() @ k.double().T * scale
    lse = scores.logsumexp(-1)
    assert scores.amax() > 50
    dout, v = torch.randn(1, readers, dim).bfloat16(), torch.randn(keys, dim).bfloat16()
    sums = [torch.zeros(1, readers, dim), torch.zeros(keys, dim), torch.zeros(keys, dim)]
    products = Products([dout, q[None], torch.zeros_like(dout)], lse.float()[None], k, v, sums, scale)
    rows = torch.arange(readers)[:150]  # filled up to 192
    products.routed(rows, slice(0, keys))
    weights = (scores - lse[:, None]).exp()[:150]
    slopes = weights * (dout[0, :150].double() @ v.double().T)
    wants = [slopes @ k.double() * scale, slopes.T @ q[:150].double() * scale, weights.T @ dout[0, :150].double()]
    for got, want in zip((sums[0][0, :150], *sums[1:]), wants, strict=True):
        assert (got.double() - want).norm() < 2**-8 * want.norm()


def test_only_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    most = cpu_products._MOST_KEYS
    monkeypatch.setattr(cpu_products, "_multiplies_bfloat16", lambda: True)
    least = cpu_products._LEAST_QUERIES
    assert products_pay(torch.bfloat16, queries=least, keys=most)
    assert not products_pay(torch.float32, queries=least, keys=most)
    assert not products_pay(torch.float16, queries=least, keys=most)
    assert not products_pay(torch.bfloat16, queries=least - 1, keys=most)
    assert not products_pay(torch.bfloat16, queries=least, keys=most + 1)
    monkeypatch.setattr(cpu_products, "_multiplies_bfloat16", lambda: False)
    assert not products_pay(torch.bfloat16, queries=least, keys=most)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_which_processors_multiply_bfloat16(
    built: bool, able: bool, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with instructions for it, where torch has oneDNN and the operator."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: built)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**{"_linear_pointwise": None} if known else {}))
    assert cpu_products._multiplies_bfloat16.__wrapped__() is (built and able and known)
