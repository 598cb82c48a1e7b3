"""Prompts: what is hidden stands where it should, and they are exactly as long as asked."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mobazoo.config.data import Data
from mobazoo.config.eval import RECALL_TASKS, RecallTask
from mobazoo.errors import InputError
from mobazoo.eval.haystack import TASKS, Haystack, pose
from mobazoo.eval.recall import score

LENGTH = 400


@pytest.fixture(scope="module")
def tokenizer(plain: Path) -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(plain)
    return found


@pytest.fixture(scope="module")
def hay(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Haystack:
    folder = tmp_path_factory.mktemp("hay")
    for letter in "xyz":
        (folder / f"{letter}.txt").write_text(letter * 300)
    return Haystack.read(Data(str(folder)), tokenizer, LENGTH)


def prompt(
    hay: Haystack, tokenizer: PreTrainedTokenizerBase, kind: str, depth: float = 0.5, number: int = 0, **said: Any
) -> tuple[str, str, tuple[str, ...]]:
    found = pose(kind, hay, LENGTH, depth, RecallTask(**said), Random(1), number)
    assert len(found.prompt) == LENGTH
    return tokenizer.decode(found.prompt), tokenizer.decode(found.reply), found.answers


def test_every_task_is_known() -> None:
    assert tuple(TASKS) == RECALL_TASKS


def test_score_by_hand() -> None:
    assert score(" 1234567. And", ["1234567"]) == 1
    assert score("12345", ["1234567"]) == 0
    assert score("abcde, XYZXY", ["ABCDE", "XYZXY", "FGHIJ", "KLMNO"]) == 0.5
    assert score("", ["a"]) == 0


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_a_needle_stands_at_its_depth(hay: Haystack, tokenizer: PreTrainedTokenizerBase, depth: float) -> None:
    text, reply, answers = prompt(hay, tokenizer, "needle", depth)
    said = re.search(r"\nThe secret number of (\w+) is (\d{7})\.\n", text)
    assert said is not None
    assert (reply, answers) == (f" {said[2]}", (said[2],))
    end = f"\nQuestion: What is the secret number of {said[1]}?\nAnswer: The secret number of {said[1]} is"
    assert text.endswith(end)
    room = LENGTH - len(end) - len(said[0])
    assert said.start() == round(depth * room)
    rest = text[: said.start()] + text[said.end() : -len(end)]
    assert rest == ("x" * 300 + "\n" + "y" * 300)[:room]


def test_samples_begin_with_other_documents(hay: Haystack, tokenizer: PreTrainedTokenizerBase) -> None:
    assert [prompt(hay, tokenizer, "needle", number=i)[0][0] for i in range(4)] == ["x", "y", "z", "x"]


def test_one_key_of_many_is_asked_for(hay: Haystack, tokenizer: PreTrainedTokenizerBase) -> None:
    text, _, answers = prompt(hay, tokenizer, "multikey", keys=4)
    said = dict(re.findall(r"\nThe secret number of (\w+) is (\d{7})\.\n", text))
    assert len(said) == len(set(said.values())) == 4
    asked = re.search(r"What is the secret number of (\w+)\?", text)
    assert asked is not None
    assert answers == (said[asked[1]],)


def test_a_pass_key_is_said_twice(hay: Haystack, tokenizer: PreTrainedTokenizerBase) -> None:
    text, reply, (answer,) = prompt(hay, tokenizer, "passkey")
    assert text.count(answer) == 2
    assert reply == f" {answer}"


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_variables_are_assigned_in_order(hay: Haystack, tokenizer: PreTrainedTokenizerBase, depth: float) -> None:
    text, reply, answers = prompt(hay, tokenizer, "tracking", depth, hops=2)
    (first, value), *rest = re.findall(r"\nVAR (\w{5}) = ([^\n]+)\n", text)
    assert [(name, of) for name, of in rest] == [(answers[1], f"VAR {first}"), (answers[2], f"VAR {answers[1]}")]
    assert answers[0] == first
    assert reply == " " + ", ".join(answers)
    assert f"Which variables hold {value}?" in text


def test_errors(hay: Haystack, tokenizer: PreTrainedTokenizerBase, texts: Path) -> None:
    with pytest.raises(InputError, match="60 tokens leave no text around what passkey hides, which takes 1"):
        pose("passkey", hay, 60, 0.5, RecallTask(), Random(0), 0)
    with pytest.raises(InputError, match=r"eval.recall.lengths: want texts of 999 tokens in all, .* has 375; give"):
        Haystack.read(Data(str(texts)), tokenizer, 999)
