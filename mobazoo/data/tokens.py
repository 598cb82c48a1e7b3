"""Documents as one flat array of tokens and their lengths."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mobazoo.data.source import Document
from mobazoo.errors import InputError

Progress = Callable[[str, int, int], None]  # what is done, how much, of how much (0: unknown)
_AT_ONCE = 64
_MARKED = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True, slots=True)
class Tokens:
    """All documents end to end.

    Attributes:
        ids: ``[tokens]`` int32.
        learn: ``[tokens]`` bool, whether a token is to be predicted; prompts of chats are not.
        lengths: tokens of each document.
        names: name of each document.
    """

    ids: Tensor
    learn: Tensor
    lengths: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Tokens of all documents."""
        return len(self.ids)


def tokenize(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
) -> Tokens:
    """Tokens of every document: what the tokenizer puts before a text, the text, and the end token.

    Args:
        documents: texts, or chats for a tokenizer with a chat template.
        tokenizer: with an end token.
        progress: told ``("tokenize", documents done, 0)``.

    Raises:
        InputError: a tokenizer without an end token or, for chats, a usable template; no document.
    """
    ids, learn, lengths, names = array("i"), bytearray(), [], []
    for name, tokens, learned in encoded(documents, tokenizer):
        ids.extend(tokens)
        learn.extend(learned)
        lengths.append(len(tokens))
        names.append(name)
        if progress is not None and len(names) % _AT_ONCE == 0:
            progress("tokenize", len(names), 0)
    if progress is not None:
        progress("tokenize", len(names), len(names))
    if not ids:
        raise InputError("data: no document is left; look at data.path, files, split and min_chars")
    flat = torch.frombuffer(ids, dtype=torch.int32)
    return Tokens(flat, torch.frombuffer(learn, dtype=torch.bool), tuple(lengths), tuple(names))


def encoded(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, list[int], Sequence[int]]]:
    """Name, tokens and which of them are learned, document by document."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise InputError("tokenizer: has no end token (eos_token), which ends each document; set one and save it")
    waiting = iter(documents)
    while batch := list(islice(waiting, _AT_ONCE)):
        texts = [document for document in batch if not document.messages]
        plain = iter(_texts([document.text for document in texts], tokenizer, end))
        for document in batch:
            if document.messages:
                yield document.name, *chat(document, tokenizer)
            else:
                tokens = next(plain)
                yield document.name, tokens, bytes([1]) * len(tokens)


def _texts(texts: list[str], tokenizer: PreTrainedTokenizerBase, end: int) -> list[list[int]]:
    if not texts:
        return []
    # A text longer than the model's context is cut into rows later; the tokenizer need not warn of it.
    found: list[list[int]] = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    return [tokens if tokens and tokens[-1] == end else [*tokens, end] for tokens in found]


def chat(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Sequence[int]]:
    """Tokens of a chat, of which the assistant's are learned.

    A template that marks them (``{% generation %}``) says which those are. Otherwise the chat is written up to and
    including each answer, with and without it: what the answer adds is learned.

    Raises:
        InputError: no template, or one that writes earlier messages differently once others follow.
    """
    if not tokenizer.chat_template:
        raise InputError("tokenizer: has no chat template, which data.messages needs")
    messages: list[dict[str, Any]] = list(document.messages)
    if tokenizer.is_fast and _MARKED.search(tokenizer.get_chat_template()):
        said: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(said["input_ids"]), bytes(said["assistant_masks"])

    def written(upto: int, prompt: bool) -> list[int]:
        result: Any = tokenizer.apply_chat_template(messages[:upto], add_generation_prompt=prompt, return_dict=True)
        return list(result["input_ids"])

    tokens = written(len(messages), prompt=False)
    learned = bytearray(len(tokens))
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = written(i, prompt=True), written(i + 1, prompt=False)
        if tokens[: len(after)] != after or after[: len(before)] != before:
            raise InputError(
                f"{document.name}: the chat template writes earlier messages differently once others follow, so its "
                "answers cannot be told from the prompt; cut such chats after their first answer"
            )
        learned[len(before) : len(after)] = bytes([1]) * (len(after) - len(before))
    return tokens, learned
