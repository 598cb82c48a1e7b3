"""A byte-level BPE tokenizer from documents, written as a Hugging Face tokenizer folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mobazoo.checkpoint.place import free_place
from mobazoo.checkpoint.staging import staged
from mobazoo.config.tokenizer import TokenizerRecipe
from mobazoo.data.documents import read_documents
from mobazoo.data.source import Document
from mobazoo.data.tokens import Progress
from mobazoo.errors import InputError

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class TokenizerReport:
    """Where it is, its tokens, and the documents and characters it was learned from."""

    dest: Path
    vocab: int
    documents: int
    characters: int


def train_tokenizer(recipe: TokenizerRecipe, progress: Progress | None = None) -> TokenizerReport:
    """Learns a tokenizer; ``recipe.dest`` appears complete, or stays as it was.

    Begin, end and padding are tokens 0, 1 and 2; begin stands before every text.

    Args:
        recipe: what to do.
        progress: told ``("read", documents read, 0)``.

    Raises:
        InputError: data or a place that cannot be used, or too little text for ``vocab`` tokens.
    """
    recipe.check()
    dest = free_place(recipe.dest, recipe.overwrite, FILE)
    documents = characters = 0

    def texts() -> list[str]:
        nonlocal documents, characters
        found = []
        for document in read_documents(recipe.data):
            found.append(_text(document))
            documents, characters = documents + 1, characters + len(found[-1])
            if progress is not None and documents % 64 == 0:
                progress("read", documents, 0)
        return found

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if tokenizer.get_vocab_size() != recipe.vocab:
        raise InputError(
            f"tokenizer.vocab: {documents} documents are enough for {tokenizer.get_vocab_size()} tokens, not "
            f"{recipe.vocab}; ask for fewer, or give more data"
        )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=recipe.max_length,
        clean_up_tokenization_spaces=False,
    )
    with staged(dest, replace=recipe.overwrite) as new:
        whole.save_pretrained(new)
    return TokenizerReport(dest, recipe.vocab, documents, characters)


def _text(document: Document) -> str:
    return document.text or "\n".join(str(message.get("content")) for message in document.messages)
