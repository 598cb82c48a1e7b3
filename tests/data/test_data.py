"""Reading, tokens, packing and collation."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mobazoo.config.data import Data
from mobazoo.config.tokenizer import TokenizerRecipe
from mobazoo.data.bpe import train_tokenizer
from mobazoo.data.collate import IGNORED, Collator
from mobazoo.data.documents import read_documents
from mobazoo.data.rows import Rows, pack
from mobazoo.data.tokens import Tokens, tokenize
from mobazoo.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(40):
        path = tmp_path / "texts" / f"{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text number {i} " * (i + 1))
    return tmp_path / "texts"


def names(data: Data) -> list[str]:
    return [document.name for document in read_documents(data)]


def test_splits_are_a_partition_and_stay_when_documents_come(folder: Path) -> None:
    parts = {split: names(Data(str(folder), split=split, validation=0.3)) for split in ("train", "validation", "all")}
    assert parts["all"] == sorted(parts["all"])
    assert len(parts["all"]) == 40
    assert sorted(parts["train"] + parts["validation"]) == parts["all"]
    assert 3 < len(parts["validation"]) < 22
    (folder / "0" / "new.txt").write_text("new")
    after = names(Data(str(folder), split="validation", validation=0.3))
    assert [name for name in after if name != "0/new.txt"] == parts["validation"]


def test_documents_are_chosen(folder: Path) -> None:
    assert len(names(Data(str(folder), files=["1/*.txt"]))) == 13
    assert len(names(Data(str(folder), max_documents=5))) == 5
    assert all(len(d.text) >= 300 for d in read_documents(Data(str(folder), min_chars=300)))
    assert names(Data(str(folder / "0" / "3.txt"))) == ["3.txt"]


def test_the_standard_library_is_there() -> None:
    found = names(Data("stdlib", files=["json/*.py", "test/test_abc.py"]))
    assert found == ["json/__init__.py", "json/decoder.py", "json/encoder.py", "json/scanner.py", "json/tool.py"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"path": "nowhere"}, r"data.path: nowhere: no such file or folder; `stdlib` needs none"),
        ({"path": ".", "files": ["*.nothing"]}, r"data.files: nothing in \. matches \*\.nothing"),
        ({"path": ".", "files": ["/x"]}, r"data.files: '/x' is no pattern below a folder"),
        ({"path": ".", "format": "csv"}, r"data.format: want one of text, jsonl, parquet, hub, got 'csv'"),
        ({"path": ".", "split": "test"}, r"data.split: want one of train, validation, all, got 'test'"),
        ({"path": ".", "validation": 1.5}, r"data.validation: want a share from 0 up to 1, got 1.5"),
        ({"path": ".", "validation": 0, "split": "validation"}, r"data.validation: 0 leaves no document"),
        ({"path": ".", "min_chars": -1}, r"data.min_chars: want a number of characters >= 0, got -1"),
        ({"path": ".", "max_documents": 0}, r"data.max_documents: want a number >= 1, got 0"),
        ({"path": "stdlib", "format": "hub"}, r"data.format: stdlib is text, got 'hub'"),
        ({"path": ".", "messages": "m"}, r"data.messages: text files hold no chats; set format"),
        ({"path": ".", "streaming": True}, r"data.streaming: only Hub datasets stream"),
    ],
)
def test_bad_sources_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_documents(Data(**fields)))  # type: ignore[arg-type]


def test_binary_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"a\.txt: not text in UTF-8; leave it out by data\.files"):
        list(read_documents(Data(str(tmp_path))))


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_a_disk_that_fails_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **given: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(InputError, match=r"a\.txt: cannot be read: input/output error"):
        list(read_documents(Data(str(tmp_path / "a.txt"), format=kind)))


@given(st.lists(st.integers(0, 60), max_size=30), st.integers(2, 20))
@settings(max_examples=150, deadline=None)
def test_packing_loses_and_repeats_nothing(lengths: list[int], length: int) -> None:
    rows = pack(lengths, length)
    pieces = sorted(piece for row in rows for piece in row)
    assert all(0 < sum(size for _, size in row) <= length for row in rows)
    want, start = [], 0
    for size in lengths:
        cuts = [(start + at, min(length, size - at)) for at in range(0, size, length)]
        want += [cut for cut in cuts if cut[1] > 1]
        start += size
    assert pieces == want
    half_empty = [row for row in rows if 2 * sum(size for _, size in row) <= length]
    assert len(half_empty) <= 1


def corpus(*lengths: int) -> Tokens:
    n = sum(lengths)
    ids = torch.arange(1, n + 1, dtype=torch.int32)
    return Tokens(ids, torch.ones(n, dtype=torch.bool), lengths, ("",) * len(lengths))


def test_a_batch_says_where_documents_are() -> None:
    rows = Rows(corpus(9, 3), 8)
    batch = Collator(8)([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [10, 11, 12, 0, 0, 0, 0, 0]]  # type: ignore[union-attr]
    assert batch["labels"][1].tolist() == [IGNORED, 11, 12] + [IGNORED] * 5  # type: ignore[index]
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 0, 0, 0, 0, 0]  # type: ignore[index]
    assert batch["attention_mask"].sum(1).tolist() == [8, 3]  # type: ignore[union-attr]
    assert (batch["max_docs"], batch["max_len"]) == (1, 8)
    assert rows.used == 11


def test_whole_rows_need_no_positions() -> None:
    rows = Rows(corpus(8, 5, 3), 8)
    assert Collator(8)([rows[0]]).keys() == {"input_ids", "labels"}
    assert Collator(8)([rows[0], rows[1]]).keys() == {"input_ids", "labels", "position_ids", "max_docs", "max_len"}
    assert Collator(8, fixed=True)([rows[0]]).keys() == {"input_ids", "labels", "position_ids", "attention_mask"}


def test_rows_need_two_tokens() -> None:
    with pytest.raises(InputError, match="no document has more than one token"):
        Rows(corpus(1, 1), 8)
    with pytest.raises(InputError, match="length: want at least 2 tokens in a row, got 1"):
        pack([5], 1)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("bpe") / "tokenizer"
    report = train_tokenizer(TokenizerRecipe(str(dest), Data("stdlib", files=["json/*.py"]), vocab=400, max_length=64))
    assert (report.vocab, report.documents) == (400, 5)
    return dest


def test_a_tokenizer_is_learned(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    text = "def déjà_vu(x):\n    return  x  # ☃\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 400
    assert tokenizer.model_max_length == 64
    assert len(ids) < len(text.encode())


def test_a_tokenizer_in_place_is_kept(tokenizer_folder: Path) -> None:
    recipe = TokenizerRecipe(str(tokenizer_folder), Data("stdlib", files=["json/*.py"]), vocab=300)
    with pytest.raises(InputError, match="exists; pass overwrite=true"):
        train_tokenizer(recipe)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vocab": 100}, "tokenizer.vocab: want at least 259"),
        ({"max_length": 0}, "tokenizer.max_length: want a number of tokens >= 1, got 0"),
        ({"vocab": 100_000}, r"tokenizer.vocab: 1 documents are enough for \d+ tokens, not 100000"),
    ],
)
def test_bad_tokenizers_are_named(fields: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train_tokenizer(TokenizerRecipe(str(tmp_path / "t"), Data("stdlib", files=["json/tool.py"]), **fields))
    assert not (tmp_path / "t").exists()


def test_tokens_of_documents_end_with_the_end_token(tokenizer_folder: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokens = tokenize(read_documents(Data(str(folder))), tokenizer)
    assert sum(tokens.lengths) == len(tokens)
    assert len(tokens.names) == 40
    starts = torch.tensor([0, *tokens.lengths]).cumsum(0)
    assert set(tokens.ids[starts[:-1]].tolist()) == {0}
    assert set(tokens.ids[starts[1:] - 1].tolist()) == {1}
    assert tokens.learn.all()
    first = next(read_documents(Data(str(folder)))).text
    assert tokenizer.decode(tokens.ids[1 : tokens.lengths[0] - 1].tolist()) == first


def test_no_document_left(tokenizer_folder: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    with pytest.raises(InputError, match="data: no document is left"):
        tokenize(read_documents(Data(str(folder), min_chars=10**6)), tokenizer)
    without: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tokenizer_folder, eos_token=None)
    with pytest.raises(InputError, match=r"tokenizer: has no end token \(eos_token\)"):
        tokenize(read_documents(Data(str(folder))), without)
