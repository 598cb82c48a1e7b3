"""The gathered schedule with a dense stand-in for FlexAttention, which on a CPU has no log-sum-exp and no backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mobazoo.attention import MoBA, Segments, attend, centroids, route
from mobazoo.attention.backends import flex_routed, reference
from mobazoo.attention.gather import places, plan, take
from mobazoo.attention.problem import Problem
from mobazoo.errors import UnsupportedError


def dense_flex(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, *, want_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What FlexAttention computes: tile lists decide what is read, the token mask counts in partial tiles only."""
    group = q.shape[1] // k.shape[1]
    shape = (*q.shape[:3], k.shape[2])
    b, h, t, s = (torch.arange(n).view(*(-1 if i == d else 1 for i in range(4))) for d, n in enumerate(shape))
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    partial = tokens_of(mask.kv_num_blocks, mask.kv_indices, mask.BLOCK_SIZE, shape)
    full = tokens_of(mask.full_kv_num_blocks, mask.full_kv_indices, mask.BLOCK_SIZE, shape)
    seen = (partial & mask.mask_mod(b, h, t, s)) | full
    some = seen.any(-1, keepdim=True)
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    scores = torch.where(some, scores.masked_fill(~seen, float("-inf")), 0.0)
    out = (scores.softmax(-1) * some) @ v.repeat_interleave(group, 1)
    return out, torch.where(some[..., 0], scores.logsumexp(-1), float("-inf")) if want_lse else None


def tokens_of(number: Tensor, which: Tensor, tile: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    listed = torch.arange(which.shape[-1]) < number[..., None]
    table = torch.zeros(which.shape, dtype=torch.int64).scatter_add_(-1, which.long(), listed.long()).bool()
    spread = table.repeat_interleave(tile[0], 2).repeat_interleave(tile[1], 3)[:, :, : shape[2], : shape[3]]
    return spread.expand(shape)


def rows(name: str) -> tuple[Segments, int, int]:
    if name == "whole":
        return Segments.single(2, 300), 300, 0
    if name == "packed":
        return Segments.from_lengths([[130, 1, 99], [256, 40]], length=300), 300, 0
    return Segments.from_lengths([[150, 150], [299]], length=300), 129, 100


@pytest.mark.parametrize("case", ["whole", "packed", "shard"])
@pytest.mark.parametrize(("block_size", "top_k"), [(7, 3), (64, 1), (64, 2), (64, 3), (100, 2), (128, 3), (301, 2)])
def test_forward_and_backward_in_float64(case: str, block_size: int, top_k: int) -> None:
    check(case, block_size, top_k)


@pytest.mark.parametrize("case", ["whole", "packed", "shard"])
def test_slabs_change_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_routed, "_SLAB_BYTES", 1)
    check(case, 64, 3)


def check(case: str, block_size: int, top_k: int) -> None:
    segments, length, q_start = rows(case)
    torch.manual_seed(block_size + top_k)
    hq, hkv, dim = (6, 2, 8) if case == "whole" else (2, 2, 8)
    q = torch.randn(2, hq, length, dim, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, hkv, 300, dim, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, hkv, 300, dim, dtype=torch.float64, requires_grad=True)
    routes = route(q, centroids(k, block_size, segments), MoBA(block_size, top_k), segments, q_start)
    out = flex_routed.compute(q, k, v, segments, routes, q_start, 0.3, dense_flex, tile=16)
    want = reference.run(q, k, v, segments=segments, routes=routes, q_start=q_start, scale=0.3)
    torch.testing.assert_close(out, want)
    weight = torch.randn_like(want)
    grads, wants = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, want))
    for grad, good in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, good)


def test_full_attention_is_one_pass() -> None:
    segments, _, q_start = rows("packed")
    q, k, v = (torch.randn(2, 2, 300, 8, dtype=torch.float64) for _ in range(3))
    out = flex_routed.compute(q, k, v, segments, None, q_start, 0.3, dense_flex)
    torch.testing.assert_close(out, reference.run(q, k, v, segments=segments, routes=None, q_start=0, scale=0.3))


def test_every_read_has_one_place_in_a_tile_of_its_block() -> None:
    torch.manual_seed(0)
    blocks, tile, hkv = 5, 8, 2
    index = torch.stack([torch.randperm(blocks + 1)[:3] - 1 for _ in range(2 * 4 * 30)]).view(2, 4, 30, 3)
    where = plan(index, blocks, hkv, tile)
    chosen = index.reshape(2, hkv, -1)
    reads = chosen.shape[2]
    assert where.row.shape[2] == places(reads, blocks, tile)
    for b in range(2):
        for j in range(hkv):
            real = where.read[b, j] >= 0
            assert sorted(where.read[b, j][real].tolist()) == (chosen[b, j] >= 0).nonzero().flatten().tolist()
            assert torch.equal(where.block[b, j].repeat_interleave(tile)[real], chosen[b, j][where.read[b, j][real]])
            assert torch.equal(where.row[b, j][real], where.read[b, j][real] // 3)
            assert torch.equal(where.place[b, j][where.read[b, j][real]], real.nonzero().flatten())
            assert ((where.place[b, j] < 0) == (chosen[b, j] < 0)).all()


def test_places_suffice_for_the_worst_spread() -> None:
    for reads in range(1, 40):
        for blocks in range(1, 9):
            worst = max(
                sum(-(-n // 4) * 4 for n in (reads - lone, *[1] * lone)) for lone in range(min(blocks, reads + 1))
            )
            assert worst <= places(reads, blocks, 4)


def test_taking_sums_gradients_in_float32() -> None:
    x = torch.ones(1, 1, 2, 1, dtype=torch.bfloat16, requires_grad=True)
    users = torch.stack([torch.arange(300), torch.full((300,), -1)])[None, None]
    out = take(x, torch.zeros(1, 1, 300, dtype=torch.int64), users)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [300.0, 0.0]  # in bfloat16 the sum would stop at 256


def test_a_cpu_is_refused_with_the_reason() -> None:
    q = torch.randn(1, 1, 64, 16)
    with pytest.raises(UnsupportedError, match=r"no log-sum-exp on a CPU.*these can: .*reference"):
        attend(q, q, q, pattern=MoBA(16, 2), backend="flex_routed")


def test_cuda_is_accepted_with_a_backward_in_kernel_dtypes() -> None:
    problem = Problem(MoBA(16, 2), "cuda", torch.float64, 64, grad=True, queries=8, slots=8)
    assert "float64" in (flex_routed.unsupported(problem) or "")
