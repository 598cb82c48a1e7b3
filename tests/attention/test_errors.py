"""Every error of ``mobazoo.attention`` by its text: what, what was given, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import mobazoo.attention
from mobazoo.attention import Full, MoBA, Routes, Segments, attend, centroids, route
from mobazoo.errors import InputError, MobazooError, UnsupportedError

Q = torch.zeros(2, 4, 8, 16)
K = torch.zeros(2, 2, 8, 16)
SINGLE = Segments.single(2, 8)


def routes(block_size: int = 4, length: int = 8) -> Routes:
    return Routes(
        torch.full((2, 4, length, 1), -1, dtype=torch.int16), torch.zeros(2, 2, dtype=torch.int32), block_size
    )


INPUT: dict[str, tuple[Callable[[], object], str]] = {
    "pattern block_size": (lambda: MoBA(0, 2), "MoBA.block_size must be an integer >= 1, got 0"),
    "pattern top_k": (lambda: MoBA(4, -1), "MoBA.top_k must be an integer >= 1, got -1"),
    "pattern type": (lambda: MoBA(4, 2.0), "MoBA.top_k must be an integer >= 1, got 2.0"),  # type: ignore[arg-type]
    "pattern bool": (lambda: MoBA(4, True), "MoBA.top_k must be an integer >= 1, got True"),
    "segments shapes": (
        lambda: Segments(SINGLE.doc, SINGLE.pos[:, :3], 1, 8),
        "Segments: doc and pos must both be [B, S], got [2, 8] and [2, 3]",
    ),
    "segments rank": (
        lambda: Segments(SINGLE.doc[0], SINGLE.pos[0], 1, 8),
        "Segments: doc and pos must both be [B, S], got [8] and [8]",
    ),
    "segments dtype": (
        lambda: Segments(SINGLE.doc.long(), SINGLE.pos, 1, 8),
        "Segments: doc and pos must be int32, got torch.int64 and torch.int32",
    ),
    "lengths negative": (
        lambda: Segments.from_lengths([[3, -1]]),
        "Segments.from_lengths: document lengths must be >= 0, got [[3, -1]]",
    ),
    "lengths too long": (
        lambda: Segments.from_lengths([[3], [3, 4]], length=6),
        "Segments.from_lengths: row 1 holds 7 tokens, more than length=6",
    ),
    "mask rank": (
        lambda: Segments.from_attention_mask(torch.ones(2, 1, 8, 8)),
        "Segments.from_attention_mask: mask must be [B, S] with 1 at tokens, got shape [2, 1, 8, 8]",
    ),
    "cu_seqlens rank": (
        lambda: Segments.from_cu_seqlens(torch.zeros(2, 2, dtype=torch.int32)),
        "Segments.from_cu_seqlens: cu_seqlens must be a 1-D integer tensor [0, n0, n0 + n1, ...], "
        "got shape [2, 2] torch.int32",
    ),
    "cu_seqlens dtype": (lambda: Segments.from_cu_seqlens(torch.zeros(3)), "got shape [3] torch.float32"),
    "cu_seqlens empty": (lambda: Segments.from_cu_seqlens(torch.zeros(0).long()), "got shape [0] torch.int64"),
    "cu_seqlens start": (
        lambda: Segments.from_cu_seqlens(torch.tensor([1, 4])),
        "Segments.from_cu_seqlens: must start at 0 and never decrease, got [1, 4]",
    ),
    "cu_seqlens order": (
        lambda: Segments.from_cu_seqlens(torch.tensor([0, 4, 3])),
        "must start at 0 and never decrease, got [0, 4, 3]",
    ),
    "position_ids shapes": (
        lambda: Segments.from_position_ids(torch.zeros(2, 8).long(), torch.ones(2, 7)),
        "Segments.from_position_ids: position_ids and mask must both be [B, S], got [2, 8] and [2, 7]",
    ),
    "position_ids rank": (
        lambda: Segments.from_position_ids(torch.zeros(8).long()),
        "position_ids and mask must both be [B, S], got [8] and None",
    ),
    "mask values": (
        lambda: Segments.from_attention_mask(torch.full((1, 3), 2)),
        "Segments.from_attention_mask: the mask must hold 0 (padding) and 1 (token) only",
    ),
    "holes": (
        lambda: Segments.from_attention_mask(torch.tensor([[1, 0, 1]])),
        "Segments.from_attention_mask: row 0 has a document that is not contiguous; padding may stand before, "
        "between or after documents, not inside one, and packed documents must restart at position 0",
    ),
    "centroids shape": (
        lambda: centroids(K[:, :, :7], 4, SINGLE),
        "centroids: k must be [B, Hkv, S, D] with B=2 and S=8 as in segments, got [2, 2, 7, 16]",
    ),
    "centroids block_size": (
        lambda: centroids(K, 0, SINGLE),
        "centroids: block_size must be an integer >= 1, got 0",
    ),
    "route rows": (
        lambda: route(Q[:1], centroids(K, 4, SINGLE), MoBA(4, 2), SINGLE),
        "route: rows, blocks and head dim must agree, got q [1, 4, 8, 16], centroids [2, 2, 2, 16] with start [2, 2], "
        "and segments of 2 rows",
    ),
    "route segments": (
        lambda: route(Q, centroids(K, 4, SINGLE), MoBA(4, 2), Segments.single(1, 8)),
        "and segments of 1 rows",
    ),
    "route dims": (lambda: route(Q[..., :8], centroids(K, 4, SINGLE), MoBA(4, 2), SINGLE), "got q [2, 4, 8, 8]"),
    "route block_size": (
        lambda: route(Q, centroids(K, 4, SINGLE), MoBA(2, 2), SINGLE),
        "route: centroids hold 2 blocks, want S // block_size = 8 // 2; make them with the pattern's block size",
    ),
    "route length": (
        lambda: route(torch.zeros(2, 4, 9, 16), centroids(K, 4, SINGLE), MoBA(4, 2), SINGLE),
        "route: T=9 queries but S=8 keys; the queries' own tokens must be among the keys",
    ),
    "route q_start": (
        lambda: route(Q[:, :, :3], centroids(K, 4, SINGLE), MoBA(4, 2), SINGLE, 500),
        "route: q_start must be in 0 .. S - T = 5, got 500",
    ),
    "route heads": (
        lambda: route(Q[:, :3], centroids(K, 4, SINGLE), MoBA(4, 2), SINGLE),
        "route: q must be [B, Hq, T, D] with Hq divisible by the centroids' Hkv, "
        "got q [2, 3, 8, 16] and centroids [2, 2, 2, 16]",
    ),
    "attend rank": (
        lambda: attend(Q[0], K, K),
        "attend: want q [B, Hq, T, D] and k, v [B, Hkv, S, D], got q [4, 8, 16], k [2, 2, 8, 16], v [2, 2, 8, 16]",
    ),
    "attend values": (lambda: attend(Q, K, K[:, :, :7]), "v [2, 2, 7, 16]"),
    "attend rows": (lambda: attend(Q[:1], K, K), "got q [1, 4, 8, 16]"),
    "attend dims": (lambda: attend(Q[..., :8], K, K), "got q [2, 4, 8, 8]"),
    "attend heads": (
        lambda: attend(Q[:, :3], K, K),
        "attend: query heads must be a multiple of key heads, got Hq=3, Hkv=2",
    ),
    "attend no heads": (lambda: attend(Q, K[:, :0], K[:, :0]), "got Hq=4, Hkv=0"),
    "attend length": (
        lambda: attend(Q, K[:, :, :5], K[:, :, :5]),
        "attend: T=8 queries but S=5 keys; the queries' own tokens must be among the keys",
    ),
    "attend dtypes": (
        lambda: attend(Q, K.half(), K),
        "attend: q, k, v must share a floating dtype of 16, 32 or 64 bits, "
        "got torch.float32, torch.float16, torch.float32",
    ),
    "attend integers": (lambda: attend(Q.int(), K.int(), K.int()), "of 16, 32 or 64 bits, got torch.int32"),
    "attend float8": (
        lambda: attend(*(x.to(torch.float8_e4m3fn) for x in (Q, K, K))),
        "of 16, 32 or 64 bits, got torch.float8_e4m3fn",
    ),
    "attend devices": (
        lambda: attend(Q, K.to("meta"), K),
        "attend: q, k, v must be on one device, got cpu, meta, cpu",
    ),
    "attend segments": (
        lambda: attend(Q, K, K, segments=Segments.single(2, 9)),
        "attend: segments are for [B=2, S=9], k has B=2, S=8; build them for the keys",
    ),
    "attend segments device": (
        lambda: attend(Q, K, K, segments=SINGLE.to("meta")),
        "attend: segments are on meta, k on cpu; use segments.to(cpu)",
    ),
    "attend q_start tensor": (
        lambda: attend(Q, K, K, q_start=torch.zeros(2)),
        "attend: q_start must be an int or a 0-dim integer tensor, got [2] torch.float32",
    ),
    "attend q_start float": (lambda: attend(Q, K, K, q_start=torch.tensor(0.0)), "got [] torch.float32"),
    "attend q_start number": (
        lambda: attend(Q, K, K, q_start=0.0),  # type: ignore[arg-type]
        "attend: q_start must be an int or a 0-dim integer tensor, got 0.0",
    ),
    "attend q_start range": (
        lambda: attend(Q[:, :, :3], K, K, q_start=6),
        "attend: q_start must be in 0 .. S - T = 5, got 6",
    ),
    "attend q_start negative": (lambda: attend(Q, K, K, q_start=torch.tensor(-1)), "0 .. S - T = 0, got -1"),
    "attend pattern": (
        lambda: attend(Q, K, K, pattern="moba"),  # type: ignore[arg-type]
        "attend: pattern must be Full() or MoBA(block_size, top_k), got 'moba'",
    ),
    "attend routes for full": (
        lambda: attend(Q, K, K, pattern=Full(), routes=routes()),
        "attend: routes were given but the pattern is Full(); pass the MoBA they were made for",
    ),
    "attend routes block_size": (
        lambda: attend(Q, K, K, pattern=MoBA(2, 2), routes=routes()),
        "attend: routes have block_size=4 and index [2, 4, 8, 1], "
        "want block_size=2 and [B, Hq, T, top_k - 1] = [2, 4, 8, 1]",
    ),
    "attend routes length": (
        lambda: attend(Q, K, K, pattern=MoBA(4, 2), routes=routes(length=7)),
        "attend: routes have block_size=4 and index [2, 4, 7, 1]",
    ),
    "attend routes width": (
        lambda: attend(Q, K, K, pattern=MoBA(4, 3), routes=routes()),
        "and index [2, 4, 8, 1], want block_size=4 and [B, Hq, T, top_k - 1] = [2, 4, 8, 2]",
    ),
    "attend routes rows": (
        lambda: attend(Q, K, K, pattern=MoBA(4, 2), routes=replace(routes(), start=torch.zeros(1, 2).int())),
        "attend: routes must have start [B, N] int32 and index of integers, "
        "got start [1, 2] torch.int32 for B=2, and index torch.int16",
    ),
    "attend routes start": (
        lambda: attend(Q, K, K, pattern=MoBA(4, 2), routes=replace(routes(), start=torch.zeros(2, 2).long())),
        "got start [2, 2] torch.int64",
    ),
    "attend routes index": (
        lambda: attend(Q, K, K, pattern=MoBA(4, 2), routes=replace(routes(), index=torch.zeros(2, 4, 8, 1))),
        "and index torch.float32",
    ),
    "attend routes device": (
        lambda: attend(Q, K, K, pattern=MoBA(4, 2), routes=replace(routes(), start=routes().start.to("meta"))),
        "attend: routes are on cpu and meta, q on cpu",
    ),
    "attend routes of long blocks": (
        lambda: attend(Q, K, K, pattern=MoBA(9, 2), routes=routes(block_size=9)),
        "attend: routes.start has a block of 9 slots from slot 0 on, S=8",
    ),
    "attend routes beyond": (
        lambda: attend(Q, K, K, pattern=MoBA(4, 2), routes=replace(routes(), start=torch.full((2, 2), 5).int())),
        "attend: routes.start has a block of 4 slots from slot 5 on, S=8",
    ),
    "attend backend": (
        lambda: attend(Q, K, K, backend="fast"),
        "attend: unknown backend 'fast'; known: auto, ",
    ),
}


@pytest.mark.parametrize("name", INPUT)
def test_input_error(name: str) -> None:
    call, message = INPUT[name]
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_refused_backend_says_why_and_what_can() -> None:
    with pytest.raises(UnsupportedError) as error:
        attend(Q, K, K, pattern=MoBA(2, 2), backend="sdpa")
    message = str(error.value)
    assert message.startswith("attend: backend 'sdpa' cannot do this: sdpa computes full attention only; use flash, ")
    assert "(these can: " in message
    able = message.split("(these can: ")[1]
    assert "reference" in able
    assert "flash" in able
    assert "sdpa" not in able


def test_flash_refuses_devices_without_a_kernel() -> None:
    with pytest.raises(UnsupportedError, match="flash has no kernel for meta"):
        attend(Q.to("meta"), K.to("meta"), K.to("meta"), backend="flash")


def test_package_attributes() -> None:
    with pytest.raises(AttributeError, match=r"module 'mobazoo.attention' has no attribute 'attention'"):
        _ = mobazoo.attention.attention


def test_errors_are_also_what_python_programmers_catch() -> None:
    assert issubclass(InputError, MobazooError)
    assert issubclass(InputError, ValueError)
    assert issubclass(UnsupportedError, MobazooError)
    assert issubclass(UnsupportedError, NotImplementedError)
