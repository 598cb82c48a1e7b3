"""A model that holds the weights of one module at a time, read from a folder when the module runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mobazoo.checkpoint.compare import EMBEDDING, HEAD
from mobazoo.checkpoint.folder import Folder
from mobazoo.checkpoint.write import cast


def stream(model: PreTrainedModel, folder: Folder, stored: Callable[[str], torch.dtype]) -> PreTrainedModel:
    """Makes a model on ``meta`` runnable in float32, one module's weights in memory at a time.

    Args:
        model: any model whose parameter names are the folder's.
        folder: where the weights are.
        stored: dtype to round a tensor to before it is widened, by its name.
    """

    def fetch(name: str) -> Tensor:
        name = EMBEDDING if name == HEAD and name not in folder.tensors else name
        return cast(folder.read(name), stored(name), name).to(torch.float32, copy=True)

    for prefix, module in model.named_modules():
        own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.is_meta]
        if own:
            module.register_forward_pre_hook(partial(_fill, fetch, f"{prefix}.", own))
            module.register_forward_hook(partial(_empty, own))
    return model


def _fill(fetch: Callable[[str], Tensor], prefix: str, names: list[str], module: nn.Module, _: Any) -> None:
    for name in names:
        setattr(module, name, nn.Parameter(fetch(prefix + name), requires_grad=False))


def _empty(names: list[str], module: nn.Module, _: Any, __: Any) -> None:
    for name in names:
        parameter: Tensor = getattr(module, name)
        setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
