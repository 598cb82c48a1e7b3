"""The Triton schedule: which kernels run over which slabs. See docs/kernels.md."""

from __future__ import annotations

import torch
from torch import Tensor

from mobazoo.attention.kernels import triton_backward, triton_forward
from mobazoo.attention.kernels.triton_lists import Lists
from mobazoo.attention.kernels.triton_slabs import Layout, Slab, lists, slabs
from mobazoo.attention.kernels.triton_tiles import Tiles, power_of_two, tiles
from mobazoo.attention.triton_runs import begin


def forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[B, Hq, T, D]`` and log-sum-exp to the base 2, float32 ``[B, Hq, T]``; padding gets zeros and -inf.

    Args:
        q: ``[B, Hq, T, D]``; the last dimension of ``q``, ``k`` and ``v`` is dense, other strides are free.
        k: ``[B, Hkv, S, D]``.
        v: ``[B, Hkv, S, D]``.
        layout: documents and routes.
        scale: of the scores.
    """
    begin("forward", q.dtype, q.shape[3], q.device.type)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    group, dim = q.shape[1] // k.shape[1], q.shape[3]
    strides = (*_strides(q), *_strides(k), *_strides(v))
    for _, parts in slabs(layout, group, dim * q.element_size()):
        for slab in parts:
            part, part_lse, block = q, lse, layout.doc  # not looked at without routed blocks
            if layout.width:
                by_block, by_read = _tiles_of_reads("forward", q, layout, slab, group), slab.pairs * group * slab.tokens
                found = lists(layout, slab, by_block.rows)
                block = found.block
                part = torch.empty(by_read * layout.width, dim, dtype=q.dtype, device=q.device)
                part_lse = torch.empty(by_read * layout.width, dtype=torch.float32, device=q.device)
                triton_forward.routed[(found.cell.shape[0],)](
                    *(q, k, v, *_table(found), layout.start, part, part_lse, scale, *strides),
                    *(slab.token, slab.tokens, slab.pair, slab.pairs, layout.blocks, layout.block_size),
                    **_constants(layout, group, dim, by_block),
                )
            in_place = _tiles_of_queries("forward", q, k, layout, slab, group)
            triton_forward.own[_grid(slab, group, in_place)](
                *(q, k, v, layout.lo, layout.begin, part, part_lse, block, out, lse, scale, *strides),
                *(q.shape[2], k.shape[2], slab.token, slab.tokens, slab.pair, layout.blocks),
                **_constants(layout, group, dim, in_place),
            )
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``, contiguous, the same bits every time.

    Args:
        dout: ``[B, Hq, T, D]``, the last dimension dense.
        q: as in the forward, and so ``k``, ``v``, ``layout`` and ``scale``.
        k: see ``q``.
        v: see ``q``.
        out: the forward's output.
        lse: the forward's log-sum-exp.
        layout: see ``q``.
        scale: see ``q``.
    """
    begin("backward", q.dtype, q.shape[3], q.device.type)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    group, dim = q.shape[1] // k.shape[1], q.shape[3]
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(dout))
    moment = _moments(out, dout)
    saved = (q, k, v, dout, lse, moment)
    for whole, parts in slabs(layout, group, dim * q.element_size()):
        found = None
        for slab in parts:
            part, block = q, layout.doc  # not looked at without routed blocks
            if layout.width:
                by_block = _tiles_of_reads("backward", q, layout, slab, group)
                found = lists(layout, slab, by_block.rows)
                block = found.block
                part = torch.empty(block.shape[0], dim, dtype=q.dtype, device=q.device)
                triton_backward.queries_routed[(found.cell.shape[0],)](
                    *(*saved, *_table(found), layout.start, part, scale, *strides, q.shape[2]),
                    *(slab.token, slab.tokens, slab.pair, slab.pairs, layout.blocks, layout.block_size),
                    **_constants(layout, group, dim, by_block),
                )
            in_place = _tiles_of_queries("backward", q, k, layout, slab, group)
            triton_backward.queries_own[_grid(slab, group, in_place)](
                *(*saved, layout.lo, layout.begin, part, block, dq, scale, *strides),
                *(q.shape[2], k.shape[2], slab.token, slab.tokens, slab.pair, layout.blocks),
                **_constants(layout, group, dim, in_place),
            )
        if found and len(parts) > 1:  # keys walk the lists of all tokens, and need no tiles of them
            found = lists(layout, whole, layout.queries)
        _keys(saved, found, layout, whole, (dk, dv), scale, strides)
    return dq, dk, dv


def _keys(
    saved: tuple[Tensor, ...],
    found: Lists | None,
    layout: Layout,
    slab: Slab,
    grads: tuple[Tensor, Tensor],
    scale: float,
    strides: tuple[int, ...],
) -> None:
    q, k = saved[:2]
    group, dim, slots = q.shape[1] // k.shape[1], q.shape[3], k.shape[2]
    held = tiles("keys", dim, q.element_size(), layout.block_size or slots, group * q.shape[2], q.device)
    number = -(-slots // held.rows)
    readers = layout.readers(held.rows)
    blocks = layout.blocks_of(held.rows) if found else (readers, readers)
    order, edge, start = (found.order, found.edge, layout.start) if found else (readers, readers, readers)
    triton_backward.keys[(number, slab.pairs)](
        *(*saved, layout.lo, layout.begin, readers, *blocks, order, edge, start, *grads, scale, *strides),
        *(q.shape[2], slots, slab.pair, number, layout.blocks, layout.block_size),
        ROUTED=found is not None,
        **_constants(layout, group, dim, Tiles(held.stream, held.rows, held.warps, held.stages)),
    )


def _moments(out: Tensor, dout: Tensor) -> Tensor:
    """``[B, Hq, T]`` float32 ``sum(dout * out)``."""
    moment = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    dim, rows, tile = out.shape[3], moment.numel(), 64
    triton_backward.delta[(-(-rows // tile),)](
        *(out, dout, moment, *_strides(dout), rows, out.shape[2], out.shape[1]),
        D=dim,
        DP=power_of_two(dim),
        BM=tile,
    )
    return moment


def _table(found: Lists) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return found.order, found.edge, found.cell, found.first


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def _grid(slab: Slab, group: int, held: Tiles) -> tuple[int, int]:
    return -(-slab.tokens * group // held.rows), slab.pairs


def _tiles_of_reads(way: str, q: Tensor, layout: Layout, slab: Slab, group: int) -> Tiles:
    """As many rows as a block is read by on average, so that small lists waste little."""
    average = group * slab.tokens * layout.width // max(1, layout.blocks)
    return tiles(way, q.shape[3], q.element_size(), average, layout.block_size, q.device)


def _tiles_of_queries(way: str, q: Tensor, k: Tensor, layout: Layout, slab: Slab, group: int) -> Tiles:
    return tiles(way, q.shape[3], q.element_size(), group * slab.tokens, layout.block_size or k.shape[2], q.device)


def _constants(layout: Layout, group: int, dim: int, held: Tiles) -> dict[str, int]:
    return {
        "HKV": layout.heads,
        "G": group,
        "W": layout.width,
        "D": dim,
        "DP": power_of_two(dim),
        "BM": held.rows,
        "BN": held.stream,
        "num_warps": held.warps,
        "num_stages": held.stages,
    }
