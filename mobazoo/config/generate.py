"""The recipe of ``mobazoo generate``. Plain data: importing this needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mobazoo.config.rules import DECODES
from mobazoo.errors import InputError


@dataclass
class GenerateRecipe:
    """One prompt, one answer. ``None`` is what the checkpoint's generation config says.

    Attributes:
        model: checkpoint folder or Hub id.
        attention: per-layer rules after the checkpoint's own.
        decode: what every layer uses after the prompt, ``full`` or ``moba`` (None: what the rules say).
        device: ``auto`` takes a GPU if there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16`` (None: as stored).
        max_new_tokens: most tokens to write.
        temperature: 0 is greedy.
        top_p: share of the probability that is sampled from.
        seed: of the sampling (None: another answer every time).
        chat: use the tokenizer's chat template (None: if it has one).
        system: system message, with a chat template.
        prefill_chunk: tokens of the prompt to read at a time, where all at once take too much memory (None: all).
        offload: keep keys and values in host memory (``host``) or in mapped files in this folder (None: on the device).
        prompt: what to continue, where the command line names none.
        dest: JSON file for prompt, text and figures (None: the console only).
    """

    model: str
    attention: list[dict[str, Any]] = field(default_factory=list)
    decode: str | None = None
    device: str = "auto"
    dtype: str | None = None
    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    chat: bool | None = None
    system: str | None = None
    prefill_chunk: int | None = None
    offload: str | None = None
    prompt: str | None = None
    dest: str | None = None

    def check(self) -> None:
        """Everything that can be known without the model.

        Raises:
            InputError: a value that no run could use.
        """
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise InputError(f"prefill_chunk: want at least 1 token, got {self.prefill_chunk}")
        if self.decode not in (None, *DECODES):
            raise InputError(f"decode: want {' or '.join(DECODES)}, got {self.decode!r}")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens: want at least 1, got {self.max_new_tokens}")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature: want 0 (greedy) or more, got {self.temperature}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InputError(f"seed: want a number of 64 bits, got {self.seed}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p: want a share above 0 and up to 1, got {self.top_p}")
        if self.top_p is not None and self.temperature == 0:
            raise InputError(
                f"top_p: temperature=0 is greedy and samples nothing, got {self.top_p}; leave one of them out"
            )
