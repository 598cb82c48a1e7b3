"""Every way to build ``Segments``: geometry, host ints, agreement between constructors, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mobazoo.attention import Segments
from mobazoo.errors import InputError
from tests.factories import padding, segments_of

Rows = tuple[tuple[int, ...], ...]

GEOMETRIES: dict[str, Rows] = {
    "whole": ((6,), (6,)),
    "right": ((4, -2), (6,)),
    "left": ((-2, 4), (6,)),
    "both": ((-2, 3, -1), (-6,)),
    "packed": ((1, 2, 3), (4, 1, 1)),
    "gaps": ((-1, 2, -1, 2), (1, -4, 1)),
    "one_slot": ((1,), (-1,)),
    "all_padding": ((-6,), (-6,)),
}


def same(got: Segments, want: Segments) -> None:
    assert got.doc.tolist() == want.doc.tolist()
    assert got.pos.tolist() == want.pos.tolist()
    assert got.doc.dtype == got.pos.dtype == torch.int32
    assert (got.max_docs, got.max_len, got.whole) == (want.max_docs, want.max_len, want.whole)
    assert (got.batch, got.length) == tuple(got.doc.shape)


def mask_of(rows: Rows) -> torch.Tensor:
    return (~padding(rows)).long()


def at_most_one_document(rows: Rows) -> bool:
    return all(sum(n > 0 for n in row) <= 1 for row in rows)


def from_the_start(rows: Rows) -> bool:
    return all(n > 0 for row in rows for n in row[:-1])


@pytest.mark.parametrize("batch, length", [(2, 6), (1, 1), (0, 6), (2, 0)])
def test_single(batch: int, length: int) -> None:
    got = Segments.single(batch, length)
    assert got.doc.tolist() == [[0] * length] * batch
    assert got.pos.tolist() == [list(range(length))] * batch
    assert (got.max_docs, got.max_len, got.whole) == (1, length, True)


@pytest.mark.parametrize("rows", [r for r in GEOMETRIES.values() if from_the_start(r)], ids=str)
def test_from_lengths(rows: Rows) -> None:
    lengths = [[n for n in row if n > 0] for row in rows]
    same(Segments.from_lengths(lengths, length=sum(map(abs, rows[0]))), segments_of(rows))


def test_from_lengths_defaults_to_the_longest_row_and_drops_empty_documents() -> None:
    same(Segments.from_lengths([[3, 0, 2], [4]]), segments_of(((3, 2), (4, -1))))
    same(Segments.from_lengths([[0], []], length=2), segments_of(((-2,), (-2,))))


def test_from_lengths_without_rows() -> None:
    got = Segments.from_lengths([])
    assert (got.doc.shape, got.max_docs, got.max_len, got.whole) == ((0, 0), 0, 0, False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("name", [n for n, rows in GEOMETRIES.items() if at_most_one_document(rows)])
def test_from_attention_mask(name: str, dtype: torch.dtype) -> None:
    same(Segments.from_attention_mask(mask_of(GEOMETRIES[name]).to(dtype)), segments_of(GEOMETRIES[name]))


@pytest.mark.parametrize("row", [(1, 2, 3), (6,), (4, -2), (1, 1, 1, 1, -2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["checked", "host ints given"])
def test_from_cu_seqlens(row: tuple[int, ...], dtype: torch.dtype, given: bool) -> None:
    ends = torch.tensor([0, *(n for n in row if n > 0)], dtype=dtype).cumsum(0).to(dtype)
    want = segments_of((row,))
    got = Segments.from_cu_seqlens(ends, 6, max_len=want.max_len if given else None)
    same(got, replace(want, whole=want.whole and not given))  # `whole` is a promise that nothing checked


def test_from_cu_seqlens_default_length_and_empty_documents() -> None:
    same(Segments.from_cu_seqlens(torch.tensor([0, 2, 2, 5])), segments_of(((2, 3),)))
    # Without a wait empty documents keep their numbers: other documents stay apart, which is all that counts.
    got = Segments.from_cu_seqlens(torch.tensor([0, 2, 2, 5]), 5, max_len=3)
    assert got.doc.tolist() == [[0, 0, 2, 2, 2]]
    assert got.pos.tolist() == [[0, 1, 0, 1, 2]]
    assert got.max_docs == 3


def restarting(rows: Rows) -> torch.Tensor:
    return segments_of(rows).pos.long()


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("given", [False, True], ids=["checked", "host ints given"])
def test_from_position_ids(name: str, given: bool) -> None:
    rows = GEOMETRIES[name]
    want = segments_of(rows)
    ints = {"max_docs": want.max_docs, "max_len": want.max_len} if given else {}
    got = Segments.from_position_ids(restarting(rows), mask_of(rows), **ints)
    same(got, replace(want, whole=want.whole and not given))


def test_from_position_ids_without_a_mask() -> None:
    same(Segments.from_position_ids(restarting(((1, 2, 3), (6,)))), segments_of(((1, 2, 3), (6,))))


def test_left_padding_as_generate_makes_it() -> None:
    """``cumsum(mask) - 1`` with 1 at padding; the position of padding must not matter."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for filler in (0, 1, -1, 7):
        ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, filler)
        same(Segments.from_position_ids(ids, mask), segments_of(((-2, 3), (5,))))


def test_left_padding_without_corrected_positions() -> None:
    """A plain forward counts positions from the first slot: the document still starts at its first token."""
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    same(Segments.from_position_ids(torch.arange(5)[None], mask), segments_of(((-2, 3),)))


def test_a_first_document_may_start_anywhere() -> None:
    same(Segments.from_position_ids(torch.tensor([[5, 6, 7, 0, 1]])), segments_of(((3, 2),)))


def test_neighbours_of_one_token() -> None:
    same(Segments.from_position_ids(torch.tensor([[0, 0, 0, 1, 0]])), segments_of(((1, 1, 2, 1),)))


def test_one_host_int_alone_saves_no_wait_so_both_are_measured() -> None:
    got = Segments.from_position_ids(restarting(((2, 4),)), max_docs=9)
    assert (got.max_docs, got.max_len) == (2, 4)


@pytest.mark.parametrize("rows", [((1, 2, 3),), ((6,),), ((4, -2),)], ids=str)
def test_constructors_agree(rows: Rows) -> None:
    lengths = [n for n in rows[0] if n > 0]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    built = [
        Segments.from_lengths([lengths], length=6),
        Segments.from_cu_seqlens(ends, 6),
        Segments.from_position_ids(restarting(rows), mask_of(rows)),
    ]
    if at_most_one_document(rows):
        built.append(Segments.from_attention_mask(mask_of(rows)))
    for segments in built:
        same(segments, segments_of(rows))


def test_to_keeps_everything() -> None:
    want = segments_of(((1, 2, 3),))
    same(want.to("cpu"), want)
    assert want.to("meta").doc.device.type == want.to("meta").pos.device.type == "meta"


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        Segments.single(1, 2).max_len = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "mask, message",
    [
        ([[1, 1, 0, 1]], "row 0 has a document that is not contiguous; padding may stand before, between or after"),
        ([[1, 1, 1, 1], [0, 1, 0, 1]], "row 1 has a document that is not contiguous"),
        ([[1, 2, 1, 1]], "the mask must hold 0 (padding) and 1 (token) only"),
        ([[-1, 1, 1, 1]], "the mask must hold 0 (padding) and 1 (token) only"),
    ],
)
def test_holes_in_a_mask_are_refused(mask: list[list[int]], message: str) -> None:
    with pytest.raises(InputError) as error:
        Segments.from_attention_mask(torch.tensor(mask))
    assert f"Segments.from_attention_mask: {message}" in str(error.value)


@pytest.mark.parametrize(
    "ids, mask, message",
    [
        ([[0, 1, 3, 4]], None, "row 0 has a document that is not contiguous"),
        ([[0, 1, 2, 3]], [[1, 1, 0, 1]], "row 0 has a document that is not contiguous"),
        ([[0, 1, 2], [0, 2, 1]], None, "row 1 has a document that is not contiguous"),
        ([[0, 1, 2]], [[1, 1, 3]], "the mask must hold 0 (padding) and 1 (token) only"),
    ],
)
def test_holes_in_positions_are_refused(ids: list[list[int]], mask: list[list[int]] | None, message: str) -> None:
    with pytest.raises(InputError) as error:
        Segments.from_position_ids(torch.tensor(ids), None if mask is None else torch.tensor(mask))
    assert f"Segments.from_position_ids: {message}" in str(error.value)
