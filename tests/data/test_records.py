"""JSONL, Parquet, Hub datasets, chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mobazoo import extras
from mobazoo.config.data import Data
from mobazoo.config.tokenizer import TokenizerRecipe
from mobazoo.data.bpe import train_tokenizer
from mobazoo.data.documents import read_documents
from mobazoo.data.tokens import tokenize
from mobazoo.errors import InputError, UnsupportedError

CHAT = [
    {"role": "user", "content": "one plus one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and one more?"},
    {"role": "assistant", "content": "three"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", [{"text": "three", "n": 1}])
    write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    found = [(d.name, d.text) for d in read_documents(Data(str(tmp_path), format="jsonl"))]
    assert found == [("a.jsonl:1", "one"), ("a.jsonl:2", "two"), ("b.jsonl:1", "three")]


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(2500)]
    parquet.write_table(pyarrow.table({"body": texts, "n": list(range(2500))}), tmp_path / "a.parquet")
    found = list(read_documents(Data(str(tmp_path), format="parquet", text="body")))
    assert [d.text for d in found] == texts
    assert found[2100].name == "a.parquet:2101"
    with pytest.raises(InputError, match=r"a.parquet: has no 'text', only body, n; say which by data.text"):
        list(read_documents(Data(str(tmp_path), format="parquet")))
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(InputError, match=r"a.parquet: not Parquet that can be read"):
        list(read_documents(Data(str(tmp_path), format="parquet")))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_datasets_are_read(streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [{"text": f"text {i}"} for i in range(5)])
    data = Data(str(tmp_path / "set"), format="hub", streaming=streaming)
    assert [d.text for d in read_documents(data)] == [f"text {i}" for i in range(5)]
    with pytest.raises(InputError, match=r"data.path: .*nowhere: "):
        list(read_documents(Data(str(tmp_path / "nowhere"), format="hub", streaming=streaming)))
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "good"}\n{"text": broken\n')
    with pytest.raises(InputError, match=r"data.path: .*set: "):
        list(read_documents(data))


@pytest.mark.parametrize(
    "line, fields, message",
    [
        ("{", {}, r"a.jsonl:1: not JSON"),
        ("[]", {}, r"a.jsonl:1: want a JSON object, got list"),
        ('{"body": "x"}', {}, r"a.jsonl:1: has no 'text', only body; say which by data.text"),
        ('{"text": 3}', {}, r"a.jsonl:1: want text in 'text', got int"),
        ('{"text": "x"}', {"messages": "chat"}, r"a.jsonl:1: has no 'chat', only text; say which by data.messages"),
        ('{"chat": [{"role": "user"}]}', {"messages": "chat"}, r"a.jsonl:1: want a list of \{role, content\}, got"),
        ('{"chat": []}', {"messages": "chat"}, r"a.jsonl:1: want a list of \{role, content\}"),
        (json.dumps({"chat": CHAT[:1]}), {"messages": "chat"}, r"a.jsonl:1: has no message of the assistant"),
    ],
)
def test_bad_rows_are_named(line: str, fields: dict[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=message):
        list(read_documents(Data(str(tmp_path), format="jsonl", **fields)))  # type: ignore[arg-type]


def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    for kind, library in (("parquet", "pyarrow"), ("hub", "datasets")):
        with pytest.raises(UnsupportedError, match=rf"needs {library}, which is not here; .*mobazoo\[data\]"):
            list(read_documents(Data(str(tmp_path), format=kind)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    dest = tmp_path_factory.mktemp("bpe") / "tokenizer"
    train_tokenizer(TokenizerRecipe(str(dest), Data("stdlib", files=["json/*.py"]), vocab=400, max_length=64))
    return AutoTokenizer.from_pretrained(dest, chat_template=TEMPLATE)


def chats(folder: Path, *rows: Any) -> Data:
    write(folder / "a.jsonl", [{"chat": row} for row in rows])
    return Data(str(folder), format="jsonl", messages="chat")


def test_only_answers_are_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenize(read_documents(chats(tmp_path, CHAT, CHAT[:2])), tokenizer)
    learned = tokenizer.decode(tokens.ids[tokens.learn].tolist())
    assert learned == "two</assistant>three</assistant>two</assistant>"
    assert len(tokens.lengths) == 2
    assert tokenizer.decode(tokens.ids[: tokens.lengths[0]].tolist()).endswith("<assistant>three</assistant>")


def test_a_template_may_mark_what_is_learned(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    marked = "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    marked += "{%- generation -%}{{ m.content }}!{%- endgeneration -%}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    plain = tokenizer.chat_template
    try:
        tokenizer.chat_template = marked
        tokens = tokenize(read_documents(chats(tmp_path, CHAT)), tokenizer)
    finally:
        tokenizer.chat_template = plain
    assert tokenizer.decode(tokens.ids[tokens.learn].tolist()) == "two!three!"
    assert tokenizer.decode(tokens.ids.tolist()).startswith("4<user>one plus one?<assistant>two!")


def test_templates_that_cannot_be_followed_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    data = chats(tmp_path, CHAT)
    plain = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
        with pytest.raises(InputError, match=r"a.jsonl:1: the chat template writes earlier messages differently"):
            tokenize(read_documents(data), tokenizer)
        tokenizer.chat_template = None
        with pytest.raises(InputError, match=r"tokenizer: has no chat template, which data.messages needs"):
            tokenize(read_documents(data), tokenizer)
    finally:
        tokenizer.chat_template = plain
