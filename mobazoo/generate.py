"""Text from a prompt, as it is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mobazoo.config.generate import GenerateRecipe
from mobazoo.errors import InputError


@dataclass(frozen=True)
class Report:
    """Tokens read and written, and the seconds all of it took."""

    prompt_tokens: int
    new_tokens: int
    seconds: float


class _Writer(TextStreamer):
    """Hands finished words on instead of printing them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each finished piece."""
        self.write(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    recipe: GenerateRecipe,
    write: Callable[[str], None],
) -> Report:
    """Continues ``prompt`` (or answers it, with a chat template); ``write`` gets the text piece by piece.

    Raises:
        InputError: an empty prompt, a chat template that is not there, or more tokens than the model has positions for.
    """
    inputs = _inputs(tokenizer, prompt, recipe).to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError("prompt: is empty; give --prompt, --prompt-file, or text on stdin")
    limit = model.config.max_position_embeddings
    if length + recipe.max_new_tokens > limit:
        raise InputError(
            f"prompt of {length} tokens and max_new_tokens={recipe.max_new_tokens}: the model has {limit} positions; "
            "shorten one of them, or convert the model to a longer context"
        )
    if recipe.seed is not None:
        torch.manual_seed(recipe.seed)
    writer, write_text = _Writer(tokenizer, write), cast(Callable[..., Tensor], model.generate)
    begin = time.perf_counter()
    output = write_text(**inputs, max_new_tokens=recipe.max_new_tokens, streamer=writer, **_sampling(recipe))
    return Report(length, output.shape[1] - length, time.perf_counter() - begin)


def _inputs(tokenizer: PreTrainedTokenizerBase, prompt: str, recipe: GenerateRecipe) -> Any:
    chat = tokenizer.chat_template is not None if recipe.chat is None else recipe.chat
    if not chat:
        return tokenizer(prompt, return_tensors="pt")
    if tokenizer.chat_template is None:
        raise InputError("chat: the tokenizer has no chat template; leave chat out or set chat=false")
    messages = [{"role": "system", "content": recipe.system}] if recipe.system else []
    messages.append({"role": "user", "content": prompt})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _sampling(recipe: GenerateRecipe) -> dict[str, Any]:
    if recipe.temperature == 0:
        # Sampling settings of the checkpoint would each warn that greedy search does not use them.
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    said = {"temperature": recipe.temperature, "top_p": recipe.top_p}
    given = {name: value for name, value in said.items() if value is not None}
    return {"do_sample": True, **given} if given else {}
