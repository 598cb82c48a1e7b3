"""Threads of ours for CPU code: each takes whole pieces of work, so that none waits for another after every kernel.

Torch shares every single kernel among its threads, and the slower one decides each time. Work by blocks is thousands of
short kernels, so that there pieces that need nothing of each other belong to one thread each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from math import gcd
from threading import Barrier
from typing import NamedTuple

import torch

# Python runs one thread at a time between kernels: with more than these, threads would wait for it.
_MOST = 16

# Queries of all heads for one thread of ours, at least. Below, torch's own threads share every call: after its last
# shared call one of them still spins for milliseconds on a core that ours would need.
LEAST_QUERIES = 8192


class Piece(NamedTuple):
    """Some key heads and some query tokens of one row."""

    row: int
    heads: slice
    tokens: slice
    part: int  # among the pieces with the same heads

    def queries(self, group: int) -> slice:
        """The query heads of its key heads."""
        return slice(self.heads.start * group, self.heads.stop * group)


def count(threads: int) -> int:
    """Threads of ours, each with an equal share of torch's ``threads``.

    Where there are too many for one each, the number (even, as key heads are) whose shares leave the fewest over.

    Example:
        >>> count(8), count(24), count(64)
        (8, 12, 16)
    """
    if threads <= _MOST:
        return threads
    return max(range(_MOST // 2, _MOST + 1, 2), key=lambda lanes: (threads // lanes * lanes, lanes))


class Shares(NamedTuple):
    """A batch cut into pieces, as many for one thread as for another."""

    pieces: list[Piece]
    lanes: int  # threads of ours that the work is enough for, 1 is the caller's


def share(batch: int, heads: int, tokens: int, least: int, most: int) -> Shares:
    """A batch cut by rows, then key heads, then tokens.

    Args:
        batch: rows.
        heads: key heads.
        tokens: queries of a head.
        least: tokens of one key head that are work enough for a thread.
        most: ranges of tokens to cut a row into.
    """
    lanes = count(torch.get_num_threads())
    while lanes > 1 and batch * heads * tokens < lanes * least:
        lanes //= 2
    of_row = lanes // gcd(batch, lanes)
    by_head = gcd(heads, of_row)
    by_token = min(most, of_row // by_head)
    over = [
        Piece(row, head, token, part)
        for row in range(batch)
        for head in _cut(heads, by_head)
        for part, token in enumerate(_cut(tokens, by_token))
    ]
    return Shares(over, lanes)


def _cut(count: int, parts: int) -> Iterator[slice]:
    for part in range(parts):
        yield slice(count * part // parts, count * (part + 1) // parts)


def spread(work: Callable[[Piece], None], over: Shares) -> None:
    """Does all pieces, on threads of ours if that pays; returns, or raises the first error, when all are done.

    ``work`` may write to disjoint parts of shared tensors; it runs without autograd.
    """
    if len(over.pieces) < 2 or over.lanes < 2:
        for piece in over.pieces:
            work(piece)
        return
    threads = torch.get_num_threads()
    inference = torch.is_inference_mode_enabled()

    def alone(piece: Piece) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # both belong to a thread
            work(piece)

    pool = _pool(count(threads), threads, os.getpid())
    done = [pool.submit(alone, piece) for piece in over.pieces]
    wait(done)
    for each in done:
        each.result()


@cache
def _pool(lanes: int, threads: int, process: int) -> ThreadPoolExecutor:
    """A pool of a process (threads do not survive a fork) whose threads run torch's kernels on their share of cores."""
    ready = Barrier(lanes)

    def begin() -> None:
        torch.get_num_threads()  # the first call of a thread takes over torch's default
        torch.set_num_threads(threads // lanes)  # of this thread, and the default of new ones
        ready.wait()

    pool = ThreadPoolExecutor(lanes, "mobazoo-lane", begin)
    wait([pool.submit(lambda: None) for _ in range(lanes)])
    torch.set_num_threads(threads)  # gives new threads their default back
    return pool
