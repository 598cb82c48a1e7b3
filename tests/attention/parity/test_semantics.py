"""What MoBA promises about geometry: each promise compares two calls of one backend, outputs and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mobazoo.attention import MoBA
from tests.factories import (
    Case,
    Inputs,
    at_slots,
    chosen_by,
    documents,
    gate_routes,
    inputs,
    oracle,
    padding,
    run,
)
from tests.marks import on_backends, trains
from tests.oracle import Attention
from tests.tolerance import NAMES, Result, check, check_pair

PACKED = Case(((1, 61, 1, 40), (30, -3, 50, 20)), 7, 3, 4, 2, 64)
PADDED = Case(((-9, 80), (80, -9), (33, -9, 47), (-89,)), 7, 3, 4, 2, 64)
WHOLE = Case(((120,), (120,)), 16, 3, 4, 2, 64)
BOTH = {"packed": PACKED, "padded": PADDED, "whole": WHOLE}
BOTH |= {f"{name}_full": case.full for name, case in BOTH.items()}
CORE = ("packed", "packed_full")


def truth(case: Case, data: Inputs, *, grad: bool) -> tuple[Attention, Result]:
    """The oracle over what the gate chose, and the reference backend's result."""
    chosen = chosen_by(gate_routes(case, data.q, data.k)) if case.block_size else []
    return oracle(case, data, chosen), run(case, data, "reference", grad=grad)


def check_same(got: Result, want: Result, case: Case, data: Inputs) -> None:
    expected, reference = truth(case, data, grad=bool(got.gradients))
    for name, a, b in zip(NAMES, got.tensors, want.tensors, strict=False):
        check_pair(name, a, b, expected, reference)


def pieced(case: Case, pieces: list[tuple[int, slice, Result]], like: Result) -> Result:
    """Results of stretches of rows laid into the rows they came from; zeros elsewhere."""
    tensors = [torch.zeros_like(x) for x in like.tensors]
    for row, slots, result in pieces:
        for whole, part in zip(tensors, result.tensors, strict=True):
            whole[row, :, slots] = part[0]
    return Result(tensors[0], tuple(tensors[1:]))


@on_backends({"packed": PACKED, "packed_full": PACKED.full, "padded": PADDED, "padded_full": PADDED.full}, core=CORE)
def test_packed_and_padded_equal_separate(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    data, grad = inputs(case, dtype, device), trains(case, dtype, backend, device)
    together = run(case, data, backend, grad=grad)
    pieces = []
    for row, slots in documents(case.rows):
        alone = replace(case, rows=((slots.stop - slots.start,),))
        pieces.append((row, slots, run(alone, at_slots(data, row, slots), backend, grad=grad)))
    check_same(together, pieced(case, pieces, together), case, data)


@on_backends(
    {"padded": PADDED, "padded_full": PADDED.full}, (torch.float32, torch.bfloat16), core=("padded", "padded_full")
)
def test_padding_is_zero_and_gets_no_gradient(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    data = inputs(case, dtype, device)
    result = run(case, data, backend, grad=trains(case, dtype, backend, device))
    empty = padding(case.rows).to(device)
    for tensor in result.tensors:
        at_padding = tensor.transpose(1, 2)[empty]
        assert at_padding.numel()
        assert (at_padding == 0).all()


@on_backends({"padded": PADDED, "padded_full": PADDED.full}, core=("padded",))
def test_padding_is_never_read(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    data, grad = inputs(case, dtype, device), trains(case, dtype, backend, device)
    empty = padding(case.rows).to(device)[:, None, :, None]
    loud = data.map(lambda x: torch.where(empty, 1e4 * torch.randn_like(x), x))
    quiet, noisy = run(case, data, backend, grad=grad), run(case, loud, backend, grad=grad)
    for a, b in zip(quiet.tensors, noisy.tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cut", [1, 35, 62, 100])
@on_backends(BOTH, core=("packed",))
def test_the_future_is_not_read(case: Case, dtype: torch.dtype, backend: str, device: str, cut: int) -> None:
    """Other queries, keys and values after a slot leave every choice and output before it as it was, bit for bit.

    Attention is compared on the same routes: later queries that choose differently change how many rows a kernel is
    given at once, and with that the order of its sums. Without fixed routes the outputs agree within the budget.
    """
    data = inputs(case, dtype, device)
    cut = min(cut, case.slots - 1)
    later = torch.arange(case.slots, device=device)[:, None] >= cut
    other = data.map(lambda x: torch.where(later, 100 * torch.randn_like(x), x))
    routes = gate_routes(case, data.q, data.k) if case.block_size else None
    if routes is not None:
        assert torch.equal(routes.index[:, :, :cut], gate_routes(case, other.q, other.k).index[:, :, :cut])
    before, after = (run(case, x, backend, routes=routes).out for x in (data, other))
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert not torch.equal(before[:, :, cut:], after[:, :, cut:])
    early = replace(case, queries=cut, first=0)
    free = Result(run(case, other, backend).out[:, :, :cut])
    check_same(free, Result(before[:, :, :cut]), early, replace(data, q=data.q[:, :, :cut], dout=data.dout[:, :, :cut]))


@on_backends({"packed": PACKED, "whole": WHOLE}, core=(), grad=True)
def test_the_past_gets_no_gradient_from_nowhere(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    """A gradient at one query reaches only keys that it reads: nothing after it, no other document."""
    data = inputs(case, dtype, device)
    row, slots = documents(case.rows)[-1]
    at = slots.stop - 3
    only = torch.zeros_like(data.dout)
    only[row, :, at] = data.dout[row, :, at]
    dq, dk, dv = run(case, replace(data, dout=only), backend, grad=True).gradients
    outside = torch.ones(len(case.rows), case.slots, dtype=torch.bool)
    outside[row, slots.start : at + 1] = False
    for gradient in (dk, dv):
        assert (gradient.transpose(1, 2)[outside.to(device)] == 0).all()
        assert gradient[row, :, at].abs().max() > 0
    outside[row, slots.start : at] = True
    assert (dq.transpose(1, 2)[outside.to(device)] == 0).all()


# Every document fits top_k * block_size, exactly in the first; one token more and a query must leave a block out.
COVERED = Case(((28, 20), (28, -20)), 7, 4, 4, 2, 64)
UNCOVERED = Case(((29, 19), (29, -19)), 7, 4, 4, 2, 64)


@pytest.mark.parametrize("given_routes", [False, True], ids=["routed inside", "routes given"])
@on_backends({"covered": COVERED, "k50": replace(PACKED, top_k=50)}, core=("covered",))
def test_enough_blocks_is_full_attention(
    case: Case, dtype: torch.dtype, backend: str, device: str, given_routes: bool
) -> None:
    data, grad = inputs(case, dtype, device), trains(case, dtype, backend, device)
    routes = gate_routes(case, data.q, data.k) if given_routes else None
    sparse = run(case, data, backend, routes=routes, grad=grad)
    check(sparse, *truth(case.full, data, grad=grad), what=backend)


@on_backends({"uncovered": UNCOVERED}, core=("uncovered",))
def test_one_token_more_is_not_full_attention(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    data = inputs(case, dtype, device)
    sparse, dense = run(case, data, backend).out, run(case.full, data, "reference").out
    differs = ((sparse - dense).abs() > 1e-4).any(-1)
    assert differs[:, :, 28].all(), "the 29th token reads 4 of 5 blocks"
    assert not differs[:, :, :28].any()


@on_backends({"packed": PACKED, "whole": WHOLE}, core=("whole",))
def test_sparse_differs_from_dense(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    data = inputs(case, dtype, device)
    sparse, dense = run(case, data, backend).out, run(case.full, data, "reference").out
    changed = ((sparse - dense).abs().amax((1, 3)) > 1e-2).cpu()
    # A query can differ once its document has more blocks behind it than it may read, and almost surely does.
    must = torch.zeros(len(case.rows), case.slots, dtype=torch.bool)
    for row, slots in documents(case.rows):
        must[row, slots.start + case.top_k * case.block_size : slots.stop] = True
    assert must.any()
    assert changed[must].all()
    assert not changed[~must].any()


LOCAL = {"packed": replace(PACKED, top_k=1), "whole": replace(WHOLE, top_k=1)}


@on_backends(LOCAL, (torch.float32, torch.bfloat16), core=("whole",))
def test_top_k_one_is_block_local(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    """Each block alone under full attention; two public implementations return full attention over everything."""
    data, grad = inputs(case, dtype, device), trains(case, dtype, backend, device)
    assert isinstance(case.pattern, MoBA)
    local = run(case, data, backend, grad=grad)
    pieces = []
    for row, slots in documents(case.rows):
        for start in range(slots.start, slots.stop, case.block_size):
            block = slice(start, min(start + case.block_size, slots.stop))
            alone = replace(case, rows=((block.stop - block.start,),), block_size=0)
            pieces.append((row, block, run(alone, at_slots(data, row, block), "reference", grad=grad)))
    check_same(local, pieced(case, pieces, local), case, data)
    dense = run(case.full, data, "reference").out
    assert ((local.out - dense).abs().amax((1, 3)) > 1e-2).float().mean() > 0.5


@on_backends(BOTH, core=("packed", "whole_full"))
def test_grouped_heads_equal_repeated_heads(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    data, grad = inputs(case, dtype, device), trains(case, dtype, backend, device)
    group = case.hq // case.hkv
    grouped = run(case, data, backend, grad=grad)
    many = replace(data, k=data.k.repeat_interleave(group, 1), v=data.v.repeat_interleave(group, 1))
    repeated = run(replace(case, hkv=case.hq), many, backend, grad=grad)
    summed = [g.unflatten(1, (-1, group)).sum(2) if n else g for n, g in enumerate(repeated.gradients)]
    check_same(grouped, Result(repeated.out, tuple(summed)), case, data)


@on_backends(BOTH, core=("packed",))
def test_twice_is_the_same(case: Case, dtype: torch.dtype, backend: str, device: str) -> None:
    """On a CPU nothing depends on the order in which threads finish."""
    if device != "cpu":
        pytest.skip("atomic adds of CUDA backward kernels come in any order")
    data, grad = inputs(case, dtype, device), trains(case, dtype, backend, device)
    first, second = (run(case, data, backend, grad=grad) for _ in range(2))
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert torch.equal(a, b)
