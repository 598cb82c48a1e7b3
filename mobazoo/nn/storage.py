"""Where a cache keeps keys and values: on the model's device, in host memory, or in a file mapped into memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mobazoo.errors import InputError

HOST = "host"


def check_offload(place: str | Path | None) -> None:
    """Refuses a folder for mapped files that is not there.

    Raises:
        InputError: naming it.
    """
    if place is not None and place != HOST and not Path(place).expanduser().is_dir():
        raise InputError(f"offload: want 'host' or a folder for mapped files, got {str(place)!r}, which is no folder")


def zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of the dtype and on the device of ``like``, to be written to inside and outside of inference mode."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


def allocate(shape: tuple[int, ...], like: Tensor, place: str | Path | None) -> Tensor:
    """Zeros in the dtype of ``like``: on its device (``place`` None), in host memory, or in a file in a folder.

    A mapped file has no name any more when this returns, and its space is freed with the tensor.
    """
    if place is None:
        return zeros(shape, like)
    if place == HOST:
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")
    handle, name = tempfile.mkstemp(prefix="mobazoo-cache-", dir=Path(place).expanduser())
    try:
        size = torch.Size(shape).numel()
        # A file with holes would be killed by a signal when the disk is full; this asks for the space now.
        os.posix_fallocate(handle, 0, max(1, size * like.dtype.itemsize))
        with torch.inference_mode(False):
            return torch.from_file(name, shared=True, size=size, dtype=like.dtype).view(shape)
    except (OSError, RuntimeError) as error:
        raise InputError(f"offload: {place}: no room for a mapped file: {str(error).splitlines()[0]}") from None
    finally:
        os.close(handle)
        Path(name).unlink()
