"""The data of a study: source files, and among their lines facts that are asked for later."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from mobazoo.checkpoint.tokenizer import load_tokenizer
from mobazoo.config.tokenizer import TokenizerRecipe
from mobazoo.data.bpe import train_tokenizer
from mobazoo.data.documents import read_documents
from mobazoo.errors import InputError
from mobazoo.files import write_whole
from tools.study.recipe import Study

_TRIES = 50


@dataclass(frozen=True, slots=True)
class Asked:
    """A document with questions: its tokens, and for each question the places of the answer's tokens."""

    ids: list[int]
    answers: list[list[int]]


def make_data(study: Study) -> PreTrainedTokenizerBase:
    """Learns the tokenizer and writes ``train.jsonl``, where they are not there already."""
    folder = study.data
    if not (folder / "tokenizer").is_dir():
        source = replace(study.source, split="train")
        train_tokenizer(TokenizerRecipe(str(folder / "tokenizer"), source, vocab=study.vocab))
    tokenizer = load_tokenizer(folder / "tokenizer")
    if not (folder / "train.jsonl").exists():
        texts = [document.text for document in read_documents(replace(study.source, split="train"))]
        tokens = sum(len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"])
        length, share = study.length, study.recall.share
        made = Documents(study, tokenizer, texts, seed=1)
        count = max(1, round(tokens / length * share / (1 - share)))
        texts += [made.text() for _ in range(count)]
        write_whole(folder / "train.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tokenizer


def asked(study: Study, tokenizer: PreTrainedTokenizerBase) -> list[Asked]:
    """The documents that recall is measured on, made from validation texts."""
    texts = [document.text for document in read_documents(replace(study.source, split="validation"))]
    made = Documents(study, tokenizer, texts, seed=2)
    return [made.asked() for _ in range(study.recall.documents)]


def words(tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Words that are one token each, the rarest of the vocabulary.

    Raises:
        InputError: it has fewer.
    """
    found = [
        (number, token[1:]) for token, number in tokenizer.get_vocab().items() if re.fullmatch("Ġ[a-z]{3,}", token)
    ]
    if len(found) < count:
        raise InputError(
            f"study.recall.words: a vocabulary of {len(tokenizer)} has {len(found)} words of one token, and keys and "
            f"values need {count}; ask for fewer, or raise vocab"
        )
    return [word for _, word in sorted(found)[-count:]]


class Documents:
    """Makes documents of at most a row's length, the same ones from the same seed."""

    def __init__(self, study: Study, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], seed: int) -> None:
        if not texts:
            raise InputError("study.source: no text is left; look at files, validation and min_chars")
        self.recall, self.tokenizer = study.recall, tokenizer
        self.length = study.length
        self.random = random.Random(seed)
        chosen = words(tokenizer, 2 * study.recall.words)
        random.Random(0).shuffle(chosen)
        self.keys, self.values = chosen[: study.recall.words], chosen[study.recall.words :]
        self.lines = [text.splitlines(keepends=True) for text in texts]

    def text(self) -> str:
        """A document."""
        return "".join(line for line, _ in self._written())

    def asked(self) -> Asked:
        """A document with the places of its answers.

        Raises:
            InputError: a row is too short for the facts.
        """
        for _ in range(_TRIES):
            spans, text = [], ""
            for line, answer in self._written():
                if answer is not None:
                    spans.append((len(text) + answer, len(text) + len(line) - 1))  # without the line's end
                text += line
            given = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
            if len(given["input_ids"]) <= self.length:
                places = enumerate(given["offset_mapping"])
                ends = [(place, first, last) for place, (first, last) in places if last > first]
                answers = [[place for place, a, b in ends if a < end and b > start] for start, end in spans]
                return Asked(given["input_ids"], answers)
        raise InputError(
            f"study.recall.facts: {self.recall.facts} facts and their questions do not fit into {self.length} tokens"
        )

    def _written(self) -> list[tuple[str, int | None]]:
        """Lines in order, and where in a line its answer begins."""
        keys = self.random.sample(self.keys, self.recall.facts)
        facts = {key: self.random.choice(self.values) for key in keys}
        told = [f"# let {key} {value}\n" for key, value in facts.items()]
        self.random.shuffle(keys)
        questions = [(f"# ask {key} {facts[key]}\n", len(f"# ask {key}")) for key in keys]
        used = sum(map(len, self.tokenizer([*told, *(line for line, _ in questions)])["input_ids"]))
        filler = list(self._filler(self.length - used - 2))
        half, late = len(filler) // 2, 3 * len(filler) // 4
        before: list[tuple[str, int | None]] = [(line, None) for line in filler[:half]]
        middle: list[tuple[str, int | None]] = [(line, None) for line in filler[half:late]]
        after: list[tuple[str, int | None]] = [(line, None) for line in filler[late:]]
        facing: list[tuple[str, int | None]] = [(line, None) for line in told]
        return [*self._mixed(before, facing), *middle, *self._mixed(after, [*questions])]

    def _mixed(
        self, one: list[tuple[str, int | None]], two: list[tuple[str, int | None]]
    ) -> Iterator[tuple[str, int | None]]:
        """Both in their own order, interleaved at random."""
        from_two = [False] * len(one) + [True] * len(two)
        self.random.shuffle(from_two)
        ones, twos = iter(one), iter(two)
        return (next(twos if second else ones) for second in from_two)

    def _filler(self, budget: int) -> Iterator[str]:
        """Lines of one text, from somewhere in it, of so many tokens at most."""
        lines = self.random.choice(self.lines)
        start = self.random.randrange(max(1, len(lines) // 2))
        some = [line if line.endswith("\n") else f"{line}\n" for line in lines[start : start + max(budget, 1)]]
        for line, ids in zip(some, self.tokenizer(some, verbose=False)["input_ids"], strict=True):
            budget -= len(ids)
            if budget < 0:
                return
            yield line
