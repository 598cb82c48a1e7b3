"""Own-block work of the flash schedule on a CPU: contiguous, causal, so it needs no gather, only large equal pieces.

The kernel's own causal tiles are 512 keys wide, so that short pieces would compute every score and throw half of them
away. Strips of few queries, each with the keys up to its last query and a mask, throw away far less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Query rows of one kernel call: its buffers should stay in cache, and bound the working memory.
TOKENS_PER_CALL = 8192
# Tokens of a piece up to which strips pay, and queries of a strip, fewer in pieces of few tokens.
STRIPPED = 1024
STRIP = 128
_SHORT_STRIP = 64
_SHORT = 256
# Tokens of a single piece up to which strips pay where threads share every call.
_SHARED = 512


Document = tuple[int, int]  # first slot, and the one after the last


@dataclass(frozen=True, slots=True)
class Tile:
    """``count`` equal pieces of own-block work, ``stride`` slots apart: queries and keys are runs of slots."""

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    stride: int
    count: int
    causal: bool  # the last keys are the queries' own tokens; else all keys are earlier, and merged into what is there

    @property
    def strip(self) -> bool:
        """Whether the kernel needs a mask, because its own is another or too coarse."""
        return self.causal and self.q_len <= STRIP


def documents(doc: Tensor, whole: bool) -> list[Document]:
    """The documents of a row of ``Segments.doc [S]``, without padding; ``whole`` if it is one that fills the row."""
    if whole:
        return [(0, doc.shape[0])]
    edge = torch.ones(doc.shape[0] + 1, dtype=torch.bool)
    torch.ne(doc[1:], doc[:-1], out=edge[1:-1])
    edges = edge.nonzero().flatten()
    real = (doc[edges[:-1]] >= 0).tolist()
    return [each for each, is_real in zip(pairwise(edges.tolist()), real, strict=True) if is_real]


def own_tiles(over: list[Document], block_size: int | None, early: int, q_start: int, q_stop: int) -> list[Tile]:
    """The own-block work (own-document, without ``block_size``) of the queries at slots ``q_start .. q_stop - 1``.

    The first ``early`` tokens of a document count as one block. Equal neighbours become one tile of many pieces, at
    most ``TOKENS_PER_CALL`` slots together.
    """
    tiles: list[Tile] = []
    run = (0, 0, 0)  # start, length, count of equal neighbours not yet turned into tiles
    for k_start, k_stop in _pieces(over, block_size, early):
        q_lo, q_hi = max(k_start, q_start), min(k_stop, q_stop)
        if q_lo >= q_hi:
            continue
        begin, length, count = run
        if q_lo > k_start:  # the piece began before the queries do
            tiles += _causal(*run) + _began_before(k_start, q_lo, q_hi)
            run = (0, 0, 0)
        elif length == q_hi - q_lo and begin + length * count == q_lo and length * (count + 1) <= TOKENS_PER_CALL:
            run = (begin, length, count + 1)
        else:
            tiles += _causal(*run)
            run = (q_lo, q_hi - q_lo, 1)
    return tiles + _causal(*run)


def _pieces(over: list[Document], block_size: int | None, early: int) -> Iterator[Document]:
    for start, stop in over:
        if block_size is None or stop - start <= early:
            yield start, stop
            continue
        if early:
            yield start, start + early
        for begin in range(start + early, stop, block_size):
            yield begin, min(begin + block_size, stop)


def _causal(start: int, length: int, count: int) -> list[Tile]:
    """The work of ``count`` neighbours of ``length`` tokens."""
    if not count:
        return []
    if length > (STRIPPED if count > 1 or torch.get_num_threads() == 1 else _SHARED):
        return [Tile(start, length, start, length, length, count, causal=True)]
    return _strips(start, start, start + length, length, count)


def _began_before(k_start: int, q_start: int, stop: int) -> list[Tile]:
    """The work of a piece whose queries are its tokens from ``q_start`` on."""
    if stop - k_start > STRIPPED:
        return [
            *_causal(q_start, stop - q_start, 1),
            Tile(q_start, stop - q_start, k_start, q_start - k_start, 0, 1, causal=False),
        ]
    return _strips(k_start, q_start, stop, 0, 1)


def _strips(k_start: int, q_start: int, stop: int, stride: int, count: int) -> list[Tile]:
    size = _SHORT_STRIP if stop - k_start <= _SHORT else STRIP
    edges = [*range(q_start, stop, size), stop]
    return [Tile(lo, hi - lo, k_start, hi - k_start, stride, count, causal=True) for lo, hi in pairwise(edges)]


def pieces_of(x: Tensor, start: int, length: int, tile: Tile) -> Tensor:
    """A tile's pieces: view of ``x`` [..., slots, D] as ``[..., count, length, D]``."""
    stop = start + tile.stride * (tile.count - 1) + length
    return x[..., start:stop, :].unfold(-2, length, max(tile.stride, 1)).mT


def strip_mask(queries: int, keys: int, group: int, dtype: torch.dtype) -> Tensor:
    """``[group * queries, keys]``: -inf on keys later than the query, 0 on others, the same for each query head.

    The last keys are the queries' own tokens; at most ``STRIP`` queries and ``STRIPPED`` keys.
    """
    return _widest_mask(group, dtype)[:, STRIP - queries :, STRIPPED - keys :].flatten(0, 1)


@lru_cache(maxsize=4)
def _widest_mask(group: int, dtype: torch.dtype) -> Tensor:
    """``[group, STRIP, STRIPPED]``, 0.5 MiB a query head, from whose corner all others are cut."""
    mask = torch.full((STRIP, STRIPPED), -torch.inf, dtype=dtype).triu_(STRIPPED - STRIP + 1)
    return mask.repeat(group, 1, 1)


def own_forward(tile: Tile, q_start: int, rowwise: list[Tensor], k: Tensor, v: Tensor, scale: float) -> None:
    """One tile's output and log-sum-exp: what is causal is written, the rest merged.

    ``rowwise`` is q and output ``[h, G, T, D]`` and log-sum-exp ``[h, G, T]``; ``k`` and ``v`` are ``[h, S, D]``.
    """
    q, out, lse = rowwise
    group, offset = q.shape[1], tile.q_start - q_start
    queries = pieces_of(q, offset, tile.q_len, tile).transpose(1, 2)  # [h, count, G, q_len, D]
    keys, values = (pieces_of(x, tile.k_start, tile.k_len, tile) for x in (k, v))  # [h, count, k_len, D]
    merged = pieces_of(out, offset, tile.q_len, tile).transpose(1, 2)
    stats = pieces_of(lse[..., None], offset, tile.q_len, tile)[..., 0].transpose(1, 2)
    if tile.causal and not tile.strip:
        for piece in range(tile.count):
            pair = (x[:, piece, None].expand(-1, group, -1, -1) for x in (keys, values))
            merged[:, piece], stats[:, piece] = forward_kernel(queries[:, piece], *pair, 0.0, True, scale=scale)
        return
    mask = strip_mask(tile.q_len, tile.k_len, group, q.dtype) if tile.strip else None
    folded = queries.flatten(2, 3)  # a call of many queries takes less time for each
    part, part_lse = forward_kernel(folded, keys, values, 0.0, False, attn_mask=mask, scale=scale)
    part, part_lse = part.view(queries.shape), part_lse.view(stats.shape)
    if tile.strip:
        merged.copy_(part)
        stats.copy_(part_lse)
    else:
        merged.lerp_(part, (part_lse - stats).sigmoid_()[..., None])
        stats.copy_(torch.logaddexp(stats, part_lse))


def own_backward(
    tile: Tile,
    q_start: int,
    rowwise: list[Tensor],
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grads: list[Tensor],
    scale: float,
) -> None:
    """One tile of one key head: from ``rowwise`` (dout, q, out, each ``[G, T, D]``) into ``grads`` (of q, k, v).

    ``k``, ``v`` and ``grads`` are float32 or wider.
    """
    offset = tile.q_start - q_start
    # In float32 whatever the dtype: on short pieces the kernel is slower in a narrow one, and its sums are rounded.
    dout, q, out = (
        pieces_of(x, offset, tile.q_len, tile)
        .transpose(0, 1)
        .to(k.dtype, memory_format=torch.contiguous_format)
        .contiguous()
        for x in rowwise
    )
    group = q.shape[1]
    keys, values = (pieces_of(x, tile.k_start, tile.k_len, tile)[:, None] for x in (k, v))  # [count, 1, k_len, D]
    stats = pieces_of(lse[..., None], offset, tile.q_len, tile)[..., 0].transpose(0, 1).contiguous()
    # As in the forward, where each thread still has a piece: this kernel shares no smaller ones.
    if tile.strip and tile.count >= torch.get_num_threads():
        dout, q, out, stats = (x.flatten(1, 2)[:, None] for x in (dout, q, out, stats))
    else:
        keys, values = (x.expand(-1, group, -1, -1) for x in (keys, values))
    causal = tile.causal and not tile.strip
    mask = strip_mask(tile.q_len, tile.k_len, q.shape[2] // tile.q_len, q.dtype) if tile.strip else None
    dq, dk, dv = backward_kernel(dout, q, keys, values, out, stats, 0.0, causal, attn_mask=mask, scale=scale)
    dq_wide, dk_wide, dv_wide = grads
    pieces_of(dq_wide, offset, tile.q_len, tile).add_(dq.reshape(-1, group, tile.q_len, dq.shape[3]).transpose(0, 1))
    pieces_of(dk_wide, tile.k_start, tile.k_len, tile).add_(dk.sum(1, dtype=dk_wide.dtype))
    pieces_of(dv_wide, tile.k_start, tile.k_len, tile).add_(dv.sum(1, dtype=dv_wide.dtype))
