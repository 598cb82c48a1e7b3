"""Text from a prompt, as it is written."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from mobazoo.config.generate import GenerateRecipe
from mobazoo.config.rules import LayerAttention
from mobazoo.errors import InputError
from mobazoo.explain import keys_read


@dataclass(frozen=True)
class Report:
    """What was read and written, and what it took.

    Attributes:
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens written.
        prefill_seconds: until the first token was there.
        decode_seconds: for all tokens after it.
        seconds: both together.
        keys_per_token: keys that a decoded token reads, per query head, mean over tokens and layers.
        peak_bytes: most memory in use: of the GPU, or of the process where there is none.
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    seconds: float
    keys_per_token: float
    peak_bytes: int

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first; None where there is none."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


class _Writer(TextStreamer):
    """Hands finished words on instead of printing them, and notes when tokens come: the prompt, the first, the last."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called by transformers with the prompt, and with each token."""
        self.times = [*self.times[:2], time.perf_counter()]
        super().put(value)

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
        InputError: an empty prompt, a chat template or a system message in one that is not there, more tokens than the
            model has positions for, or a generation config that asks for several texts at once.
    """
    for name in ("num_beams", "num_return_sequences"):
        many = getattr(model.generation_config, name) or 1
        if many > 1:
            raise InputError(
                f"generation_config.json: {name}={many}: a text that is shown as it is written cannot have several "
                "beams or siblings; set it to 1 there, or call model.generate"
            )
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
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    writer, write_text = _Writer(tokenizer, write), cast(Callable[..., Tensor], model.generate)
    options = {"prefill_chunk": recipe.prefill_chunk, "offload": recipe.offload, "return_dict_in_generate": False}
    output = write_text(**inputs, max_new_tokens=recipe.max_new_tokens, streamer=writer, **options, **_sampling(recipe))
    start, first, last = (*writer.times, writer.times[-1])[:3]
    new = output.shape[1] - length
    return Report(
        prompt_tokens=length,
        new_tokens=new,
        prefill_seconds=first - start,
        decode_seconds=last - first,
        seconds=last - start,
        keys_per_token=decoded_keys(model.config.attention_layers(), length, new),
        peak_bytes=torch.cuda.max_memory_allocated(model.device) if cuda else _peak_of_process(),
    )


def decoded_keys(layers: Sequence[LayerAttention], prompt: int, new: int) -> float:
    """Keys that a decoded token reads, per query head, mean over tokens and layers.

    ``new`` tokens are written after ``prompt`` tokens; all but the last are read again, or for one the prompt's last.
    """
    begin, end = (prompt, prompt + new - 1) if new > 1 else (prompt - 1, prompt)
    patterns = [layer.decode_pattern for layer in layers]
    read = sum(keys_read(pattern, end) - keys_read(pattern, begin) for pattern in patterns)
    return read / (len(layers) * (end - begin))


def _peak_of_process() -> int:
    """``getrusage`` counts KiB, and bytes on a Mac."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _inputs(tokenizer: PreTrainedTokenizerBase, prompt: str, recipe: GenerateRecipe) -> Any:
    chat = tokenizer.chat_template is not None if recipe.chat is None else recipe.chat
    if recipe.system and not chat:
        why = "chat=false" if tokenizer.chat_template is not None else "the tokenizer has none"
        raise InputError(f"system: stands in a chat template, and {why}; leave it out, or put it into the prompt")
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
