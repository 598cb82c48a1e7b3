"""A model on the device that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mobazoo.checkpoint.load import Progress, checked, load
from mobazoo.nn.causal_lm import MobaForCausalLM


def ready_model(
    name: str | Path,
    *,
    attention: Sequence[Mapping[str, Any]] = (),
    device: str = "auto",
    dtype: str | None = None,
    progress: Progress | None = None,
) -> MobaForCausalLM:
    """``load``, where ``auto`` is a GPU if there is one.

    Raises:
        InputError, UnsupportedError: as ``load``.
    """
    return load(name, attention=attention, device=chosen(device), dtype=dtype, progress=progress)


def check_ready(
    name: str | Path, *, attention: Sequence[Mapping[str, Any]] = (), device: str = "auto", dtype: str | None = None
) -> None:
    """Everything that ``ready_model`` checks before it reads a tensor.

    Raises:
        InputError, UnsupportedError: as ``load``.
    """
    checked(name, attention=attention, device=chosen(device), dtype=dtype)


def chosen(device: str) -> str:
    """``auto`` is a GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
