"""Prompts that hide something in a text: needle, pass key, one of many keys, chained variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_uppercase, digits

from transformers import PreTrainedTokenizerBase

from mobazoo.config.data import Data
from mobazoo.config.eval import RecallTask
from mobazoo.data.documents import read_documents
from mobazoo.errors import InputError

_NAMES = [
    "Lisbon",
    "Nairobi",
    "Oslo",
    "Lima",
    "Hanoi",
    "Quito",
    "Riga",
    "Dakar",
    "Turin",
    "Osaka",
    "Perth",
    "Bergen",
    "Cusco",
    "Tunis",
    "Malmo",
    "Leeds",
    "Porto",
    "Davao",
    "Basel",
    "Izmir",
    "Salta",
    "Gdansk",
    "Kigali",
    "Mysore",
    "Tampa",
    "Utrecht",
    "Vaduz",
    "Xian",
    "York",
    "Zagreb",
]


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt and what should follow it.

    Attributes:
        prompt: tokens, the question at the end.
        reply: tokens of the expected reply.
        answers: what a reply must hold.
    """

    prompt: list[int]
    reply: list[int]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Hidden:
    """What a task hides and asks, as text.

    Attributes:
        needles: sentences, each with its depth from 0 (the beginning) to 1.
        question: what stands at the end.
        reply: the expected reply, with the space it begins with.
        answers: what a reply must hold.
    """

    needles: list[tuple[float, str]]
    question: str
    reply: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Haystack:
    """Documents laid end to end.

    Attributes:
        tokens: all of them.
        starts: where each document begins.
        begin: what the tokenizer puts before a text.
        encode: text to tokens, nothing added.
    """

    tokens: list[int]
    starts: list[int]
    begin: list[int]
    encode: Callable[[str], list[int]]

    @classmethod
    def read(
        cls,
        data: Data,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        most: int = 64,
        where: str = "eval.recall.lengths",
    ) -> Haystack:
        """At least ``length`` tokens, and up to ``most`` documents, so that samples begin in different ones.

        Raises:
            InputError: all documents together are shorter.
        """

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

        tokens: list[int] = []
        starts: list[int] = []
        for document in read_documents(data):
            if len(tokens) >= length and (len(starts) >= most or len(tokens) >= 4 * length):
                break
            starts.append(len(tokens))
            tokens += encode(document.text + "\n")
        if len(tokens) < length:
            raise InputError(
                f"{where}: want texts of {length} tokens in all, data.path={data.path} has {len(tokens)}; "
                "give shorter lengths or other data"
            )
        begin = [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]
        return cls(tokens, starts, begin, encode)

    def text(self, number: int, length: int) -> list[int]:
        """``length`` tokens from the start of a document on, around the end to the first."""
        at = self.starts[number % len(self.starts)]
        return (self.tokens[at:] + self.tokens[:at])[:length]


def pose(
    kind: str,
    haystack: Haystack,
    length: int,
    depth: float,
    task: RecallTask,
    source: Random,
    number: int,
    where: str = "eval.recall.lengths",
) -> Question:
    """A prompt of exactly ``length`` tokens.

    Args:
        kind: one of ``TASKS``.
        haystack: what hides the needles.
        length: of the prompt, its question included.
        depth: of what is asked for, 0 at the beginning of the text and 1 at its end.
        task: how many keys and hops.
        source: of names, numbers and other depths.
        number: of the sample; each begins with another document.
        where: the key of the length, for messages.

    Raises:
        InputError: no room for the needles.
    """
    hidden = TASKS[kind](depth, task, source)
    question = haystack.encode(f"\n{hidden.question}")
    needles = [(place, haystack.encode(f"\n{text}\n")) for place, text in sorted(hidden.needles, key=lambda n: n[0])]
    room = length - len(haystack.begin) - len(question) - sum(len(needle) for _, needle in needles)
    if room < 1:
        raise InputError(
            f"{where}: {length} tokens leave no text around what {kind} hides, which takes "
            f"{length - room}; give longer lengths"
        )
    prompt, text, done = list(haystack.begin), haystack.text(number, room), 0
    for place, needle in needles:
        at = round(place * room)
        prompt += text[done:at] + needle
        done = at
    prompt += text[done:] + question
    return Question(prompt, haystack.encode(hidden.reply), hidden.answers)


def _number(source: Random, length: int = 7) -> str:
    return source.choice(digits[1:]) + "".join(source.choices(digits, k=length - 1))


def needle(depth: float, task: RecallTask, source: Random) -> Hidden:
    """One sentence about a city."""
    return _cities([depth], source)


def multikey(depth: float, task: RecallTask, source: Random) -> Hidden:
    """Many such sentences, one of them asked for."""
    return _cities([depth, *(source.random() for _ in range(task.keys - 1))], source)


def _cities(depths: Sequence[float], source: Random) -> Hidden:
    names = source.sample(_NAMES, len(depths))
    numbers = [_number(source) for _ in names]
    sentences = [f"The secret number of {name} is {said}." for name, said in zip(names, numbers, strict=True)]
    question = f"Question: What is the secret number of {names[0]}?\nAnswer: The secret number of {names[0]} is"
    return Hidden(list(zip(depths, sentences, strict=True)), question, f" {numbers[0]}", (numbers[0],))


def passkey(depth: float, task: RecallTask, source: Random) -> Hidden:
    """A number that is said twice (after arXiv 2305.16300)."""
    key = _number(source, 5)
    sentence = f"The pass key is {key}. Keep it in mind: {key} is the pass key."
    return Hidden([(depth, sentence)], "Question: What is the pass key?\nAnswer: The pass key is", f" {key}", (key,))


def tracking(depth: float, task: RecallTask, source: Random) -> Hidden:
    """A variable with a number, and others assigned from it one after another, to the end of the text."""
    names: list[str] = []
    while len(names) < task.hops + 1:
        name = "".join(source.choices(ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = _number(source, 5)
    lines = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
    places = [depth, *sorted(depth + (1 - depth) * source.random() for _ in names[1:])]
    question = f"Question: Which variables hold {value}?\nAnswer: The variables that hold {value} are"
    return Hidden(list(zip(places, lines, strict=True)), question, f" {', '.join(names)}", tuple(names))


TASKS: dict[str, Callable[[float, RecallTask, Random], Hidden]] = {
    "needle": needle,
    "passkey": passkey,
    "multikey": multikey,
    "tracking": tracking,
}
