"""A model on the device that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mobazoo.checkpoint.load import Progress, checked, load
from mobazoo.errors import InputError
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
    return load(name, attention=attention, device=usable(device), dtype=dtype, progress=progress)


def check_ready(
    name: str | Path, *, attention: Sequence[Mapping[str, Any]] = (), device: str = "auto", dtype: str | None = None
) -> None:
    """Everything that ``ready_model`` checks before it reads a tensor.

    Raises:
        InputError, UnsupportedError: as ``load``.
    """
    checked(name, attention=attention, device=chosen(device), dtype=dtype)


def usable(device: str, where: str = "device") -> str:
    """``chosen``, where it is on this machine.

    Raises:
        InputError: no device, or a GPU where there is none.
    """
    found = chosen(device)
    try:
        kind = torch.device(found).type
    except RuntimeError:
        raise InputError(f"{where}: want auto, cpu or cuda, got {device!r}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{where}: want auto or cpu, there is no GPU here, got {device!r}")
    return found


def chosen(device: str) -> str:
    """``auto`` is a GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
