"""What one call of a varlen kernel reads: runs of queries and runs of keys as cumulated lengths, built on the device.

Everything here has a shape the host knows without waiting for the device: a bound on how many runs there can be.
Runs that are not needed have neither queries nor keys.

Shapes: a *pair* is one row with one key head, ``P`` pairs are rows times heads, row first. Keys are ``[P * L, 1, D]``
tokens, pair by pair. ``m`` is the bound on the runs of a pair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sequences(NamedTuple):
    """Runs of queries and keys; run ``i`` is queries ``cu_q[i] .. cu_q[i + 1] - 1`` and likewise for keys.

    Attributes:
        cu_q: ``[runs + 1]`` int32, never decreasing. Queries outside ``cu_q[0] .. cu_q[-1]`` are in no run.
        cu_k: ``[runs + 1]`` int32, from 0 to the number of keys.
        max_q: host int, no run that has keys has more queries.
        max_k: host int, no run that has queries has more keys.
        causal: queries are the last of the run's keys and see no later one.
    """

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool


class Routed(NamedTuple):
    """The routed pass of some queries; entries are those of their routes, ``[P, G, t, K - 1]``, in all ``E``."""

    sequences: Sequences  # over entries in the order of ``order``
    order: Tensor  # [E] int64, entries by the block they name, empty ones last and in no run
    place: Tensor  # [P, G, t, K - 1] int64, where in ``order`` each entry stands
    chosen: Tensor  # [P, G, t, K - 1] bool, which entries name a block


def own_runs(slots: int, block_size: int, max_docs: int) -> int:
    """Most runs of a pair in the own-block pass (``block_size`` 0: own-document) over ``slots`` keys.

    Blocks, with a short one in each document and one cut where the slots begin; padding runs, and after each one the
    padding's queries; the end of the queries, which may stand in padding.
    """
    blocks = slots // block_size if block_size else 0
    return min(2 * slots, blocks + 3 * max_docs + 6)


def own_sequences(
    doc: Tensor,
    pos: Tensor,
    first: int | Tensor,
    queries: int,
    heads: int,
    block_size: int,
    max_docs: int,
    longest: int,
) -> Sequences:
    """Each query with the keys of its own block (``block_size`` 0: its document) up to itself.

    A run ends after the last query, so that queries are the last of its keys, as kernels align them. Padding gets two
    runs: its keys without queries, then its queries without keys. So no work is done for padding.

    Args:
        doc: ``[R, L]``, documents of the keys.
        pos: ``[R, L]``, positions inside them.
        first: key index of the first query, of ``queries`` in all.
        heads: key heads; pairs are ``R * heads``.
        block_size: tokens in a block, 0 for full attention.
        max_docs: most documents in a row.
        longest: most tokens in a document.
    """
    rows, slots = doc.shape
    slot = torch.arange(slots, device=doc.device)
    padding = doc < 0
    turn = doc[:, 1:] != doc[:, :-1]
    if block_size:
        turn |= (pos[:, 1:] % block_size == 0) & ~padding[:, 1:]
    turn |= slot[1:] == first + queries
    step = turn.int() + (turn & padding[:, :-1])  # padding's queries take a number that no slot has
    number = torch.cat([step.new_zeros(rows, 1), step.cumsum(1, dtype=torch.int32)], dim=1)  # [R, L]
    runs = own_runs(slots, block_size, max_docs)
    wanted = torch.arange(runs, dtype=torch.int32, device=doc.device).expand(rows, runs).contiguous()
    start = torch.searchsorted(number, wanted)  # [R, m], the end where there is no such run
    begun = torch.cat([start, start.new_full((rows, 1), slots)], dim=1)  # [R, m + 1]
    after_padding = (begun < slots) & padding.gather(1, begun.clamp(max=slots - 1))
    q_from = begun.clone()
    q_from[:, 1:] = torch.where(after_padding[:, :-1], begun[:, :-1], begun[:, 1:])
    q_from = (q_from - first).clamp(0, queries)  # [R, m + 1]
    size = max(1, min(block_size or longest, slots))
    return Sequences(
        cu_q=_over_pairs(q_from[:, :-1], heads, queries),
        cu_k=_over_pairs(start, heads, slots),
        max_q=min(size, queries),
        max_k=size,
        causal=True,
    )


def routed_runs(blocks: int, *, whole: bool) -> int:
    """Runs of a pair in the routed pass over ``blocks`` blocks: the gaps between them are runs too."""
    return blocks + 1 if whole else 2 * blocks + 1


def routed_sequences(
    index: Tensor, real: Tensor, start: Tensor, slots: int, heads: int, block_size: int, *, whole: bool
) -> Routed:
    """Queries grouped by the block they chose, each block one run of keys, in place.

    Args:
        index: ``[R, Hq, t, K - 1]``, ``Routes.index`` of some queries; ``Hq`` is a multiple of ``heads``.
        real: ``[P, 1, t]`` bool; entries of the other queries, padding, are dropped.
        start: ``[R, n]``, first slots of the blocks those queries may read, ascending, -1 at the end is unused.
        slots: ``L``, keys of a pair.
        heads: key heads; pairs are ``R * heads``.
        block_size: tokens in a block.
        whole: every row is one document that fills it, so that blocks stand side by side.
    """
    rows, n = start.shape
    device = index.device
    if whole:
        edges = (torch.arange(n + 1, device=device) * block_size).expand(rows, n + 1)
        runs_of_block, first_run = 1, 0
    else:
        begin = torch.where(start < 0, slots, start).clamp(max=slots)
        ends = torch.stack([begin, (begin + block_size).clamp(max=slots)], dim=2).flatten(1)  # [R, 2 * n]
        edges = torch.cat([ends.new_zeros(rows, 1), ends], dim=1)
        runs_of_block, first_run = 2, 1
    pairs, runs = rows * heads, routed_runs(n, whole=whole)
    block = index.reshape(pairs, -1, *index.shape[2:]).int()  # [P, G, t, K - 1]
    chosen = (block >= 0) & real[..., None]
    base = torch.arange(pairs, dtype=torch.int32, device=device).view(-1, 1, 1, 1) * runs + first_run
    run = torch.where(chosen, base + block * runs_of_block, pairs * runs)
    grouped, order = run.flatten().sort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=device))
    every = torch.arange(pairs * runs + 1, dtype=torch.int32, device=device)
    cu_q = torch.searchsorted(grouped, every, out_int32=True)
    cu_k = _over_pairs(edges, heads, slots)
    most = index.shape[1] // heads * index.shape[2]  # a query head reads a block once
    return Routed(Sequences(cu_q, cu_k, most, block_size, causal=False), order, place.view(chosen.shape), chosen)


def read_keys(sequences: Sequences, keys: int) -> Tensor:
    """``[keys]`` bool, which keys are in a run with queries: the others have no gradient, whatever a kernel leaves."""
    key = torch.arange(keys, dtype=torch.int32, device=sequences.cu_k.device)
    run = torch.searchsorted(sequences.cu_k, key, right=True) - 1
    return (sequences.cu_q[1:] > sequences.cu_q[:-1]).index_select(0, run)


def _over_pairs(start: Tensor, heads: int, length: int) -> Tensor:
    """Starts ``[R, m]`` inside a row's ``length`` tokens as cumulated lengths ``[P * m + 1]`` over all pairs, int32."""
    rows = start.shape[0]
    pair = torch.arange(rows * heads, device=start.device).view(rows, heads, 1)
    starts = (start[:, None] + pair * length).flatten()
    return torch.cat([starts, starts.new_full((1,), rows * heads * length)]).to(torch.int32)
