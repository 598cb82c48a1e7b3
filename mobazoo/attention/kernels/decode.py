"""Block attention of few queries: each reads its own blocks where they lie, and nothing else of the keys and values.

On a CPU in float32 and float64 no key is copied. The scores are a sampled product, ``q k^T`` at given entries of a
sparse matrix, and the output is a weighted sum of given rows of ``v``, as for a bag of embeddings; both run over all
heads at once. Elsewhere the rows are gathered first, where the keys are: they may lie on another device than the
queries, and only what is read moves.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mobazoo.attention.heap import keep_heap

# Keys and values gathered at a time, in bytes. On a CPU they should stay in cache.
_GATHER_BYTES = {"cpu": 4 << 20}
_GATHER_BYTES_DEFAULT = 256 << 20
# Row numbers at a time, in entries of 8 bytes.
_NUMBERS = 8 << 20


@torch.library.custom_op("mobazoo::decode", mutates_args=())
def decode(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, slot: Tensor, block_size: int, scale: float) -> Tensor:
    """Attention of ``q`` over the tokens up to its own in blocks ``begin``.

    Args:
        q: ``[B, Hq, T, D]``.
        k: ``[B, Hkv, S, D]``, views of a cache; on another device than ``q`` their rows are gathered there.
        v: the same.
        begin: ``[B, Hq, T, K]`` int64, first slots of the blocks a query reads, its own among them; -1 reads nothing.
        slot: ``[T]`` int64, the queries' slots.
        block_size: tokens in a block.
        scale: of the scores.

    Returns:
        ``[B, Hq, T, D]``; rows that read nothing are zeros.
    """
    batch, hq, length, dim = q.shape
    rows, group, width = batch * hq * length, hq // k.shape[1], begin.shape[3] * block_size
    last = slot.expand(batch, hq, length).reshape(rows, 1, 1)
    # What is empty begins after the query, where everything is hidden.
    first = begin.reshape(rows, -1, 1)
    first = torch.where(first < 0, last + 1, first)
    head = torch.arange(rows, device=q.device) // length
    number = (head // hq, head % hq // group)
    queries, out = q.reshape(rows, dim), q.new_empty(rows, dim)
    # A sparse row cannot name more columns than there are, which hidden entries of a short cache would.
    in_place = (
        k.device.type == "cpu" == q.device.type
        and q.dtype in (torch.float32, torch.float64)
        and width <= _table(k)[0].shape[0]
    )
    limit = _GATHER_BYTES.get(q.device.type, _GATHER_BYTES_DEFAULT) // (2 * dim * q.element_size())
    step = max(1, (_NUMBERS if in_place else limit) // width)
    inside = torch.arange(block_size, device=q.device)
    for r0 in range(0, rows, step):
        part = slice(r0, r0 + step)
        at = first[part] + inside  # [r, K, block_size]
        hidden = (at > last[part]).flatten(1)  # [r, K * block_size]
        # Hidden entries point at the query's own token: no slot after it is touched, whatever it holds.
        at = torch.minimum(at, last[part]).flatten(1)
        base = (number[0][part, None], number[1][part, None])
        keys = _numbered(k, at, *base)
        # Caches keep keys and values alike, and so have the same rows of both.
        alike = k.shape == v.shape and k.stride() == v.stride()
        values = (_table(v)[0], keys[1]) if alike else _numbered(v, at, *base)
        attend = _sampled if in_place else _gathered
        out[part] = attend(queries[part], *keys, *values, hidden, scale)
    return out.view(q.shape).masked_fill_((begin < 0).all(-1, keepdim=True), 0.0)


@decode.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def _table(x: Tensor) -> tuple[Tensor, list[int]]:
    """``x`` [B, Hkv, S, D] as a table [rows, D] without a copy, and its strides in rows of the table."""
    dim = x.shape[3]
    if x.stride(3) != 1 or any(stride % dim for stride in x.stride()[:3]):
        x = x.contiguous()
    strides = [stride // dim for stride in x.stride()[:3]]
    count = 1 + sum((size - 1) * stride for size, stride in zip(x.shape[:3], strides, strict=True))
    return x.as_strided((count, dim), (dim, 1)), strides


def _numbered(x: Tensor, at: Tensor, row: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as a table, and the table's rows of slots ``at`` [r, width]."""
    table, strides = _table(x)
    base = row * strides[0] + head * strides[1]
    return table, (at if strides[2] == 1 else at * strides[2]) + base


def _sampled(
    q: Tensor, keys: Tensor, at_k: Tensor, values: Tensor, at_v: Tensor, hidden: Tensor, scale: float
) -> Tensor:
    """``[r, D]`` in place; see the module."""
    _quiet()
    rows, width = at_k.shape
    ends = torch.arange(0, rows * width + 1, width)
    wanted = torch.sparse_csr_tensor(
        ends, at_k.flatten(), q.new_zeros(rows * width), (rows, keys.shape[0]), check_invariants=False
    )
    scores = torch.sparse.sampled_addmm(wanted, q, keys.T, beta=0.0, alpha=scale).values().view(rows, width)
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    return torch.embedding_bag(values, at_v.flatten(), ends[:-1], False, 0, False, weights.flatten())[0]


@cache
def _quiet() -> None:
    """Takes torch's one warning that sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


def _gathered(
    q: Tensor, keys: Tensor, at_k: Tensor, values: Tensor, at_v: Tensor, hidden: Tensor, scale: float
) -> Tensor:
    """``[r, D]`` on gathered copies."""
    if keys.device.type == "cpu":
        keep_heap()
    k, v = (
        table.index_select(0, at.flatten().to(table.device)).to(q.device).view(at.shape[0], 1, at.shape[1], -1)
        for table, at in ((keys, at_k), (values, at_v))
    )
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    return scaled_dot_product_attention(q[:, None, None], k, v, attn_mask=mask[:, None, None], scale=scale)[:, 0, 0]
