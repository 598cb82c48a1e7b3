"""``load``: a checkpoint folder or Hub id to a model, checked before a tensor is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from mobazoo.attention.backends import BACKENDS
from mobazoo.attention.pattern import MoBA
from mobazoo.attention.problem import Problem
from mobazoo.checkpoint.compare import EMBEDDING, FLOATS, HEAD, check_fits, is_computed
from mobazoo.checkpoint.family import family_of, skeleton, zoo_config
from mobazoo.checkpoint.folder import Folder, inside, open_folder, read_json
from mobazoo.checkpoint.hub import locate
from mobazoo.checkpoint.manifest import check_manifest
from mobazoo.config.dtypes import DTYPES
from mobazoo.config.rules import LayerAttention
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.nn.causal_lm import MobaForCausalLM

Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all
SHORTHANDS = ("moba", "moba_naive", "full")
_GENERATION = "generation_config.json"


def load(
    path_or_name: str | Path,
    *,
    attention: Sequence[Mapping[str, Any]] | None = None,
    attn: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    check_sums: bool = False,
    progress: Progress | None = None,
) -> MobaForCausalLM:
    """A zoo checkpoint, or a plain Hugging Face Llama or Qwen with full attention, as one of our models in eval mode.

    Memory peaks at the weights plus one tensor.

    Args:
        path_or_name: local folder, or Hub id (``org/name``); offline where ``HF_HUB_OFFLINE`` is set.
        attention: per-layer rules after the folder's own: each changes the fields it names for the layers it names, so
            ``[{"layers": ":", "pattern": "full"}]`` is full attention everywhere and ``[{"backend": "flash"}]`` another
            backend for the patterns there are.
        attn: ``moba`` (the rules, which must give some layer MoBA), ``moba_naive`` (the same by the reference backend)
            or ``full`` (no layer MoBA).
        device: where the model goes (None: torch's default device).
        dtype: of all weights (None: what ``config.json`` says, else what most of the weights are stored in).
        revision: branch, tag or commit of a Hub repository.
        check_sums: also compare every file with the folder's manifest.
        progress: told ``("load", bytes read, bytes in all)`` after every tensor.

    Raises:
        InputError: no checkpoint, a damaged one, tensors that do not fit it, or rules that do not.
        UnsupportedError: another architecture or rope type, pickled or quantised weights, a backend that cannot do
            what its layer needs.
    """
    folder, model = checked(path_or_name, attention=attention, attn=attn, device=device, dtype=dtype, revision=revision)
    if check_sums:
        check_manifest(folder.path)
    _read_tensors(model, folder, _device(device), _dtype(dtype, folder), progress)
    if (folder.path / _GENERATION).exists():
        model.generation_config = _generation_config(inside(folder.path, _GENERATION))
    return model


def checked(
    path_or_name: str | Path,
    *,
    attention: Sequence[Mapping[str, Any]] | None = None,
    attn: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> tuple[Folder, MobaForCausalLM]:
    """What ``load`` checks before it reads a tensor: the folder, and the model on ``meta``; arguments as there.

    Raises:
        InputError, UnsupportedError: as ``load``.
    """
    folder = open_folder(locate(path_or_name, revision))
    family = family_of(folder.config, folder.path)
    rules = [*(attention or ()), *_shorthand(attn)]
    config = zoo_config(family, folder.config, rules, folder.path)
    where, kind = _device(device), _dtype(dtype, folder)
    layers: tuple[LayerAttention, ...] = config.attention_layers()
    if attn in ("moba", "moba_naive") and not any(isinstance(layer.pattern, MoBA) for layer in layers):
        raise InputError(
            f"{folder.path}: attn={attn!r} but no rule gives a layer MoBA; pass attention=[{{'layers': ':', 'pattern': "
            "'moba', 'block_size': 4096, 'top_k': 12}], or convert the checkpoint"
        )
    check_backends(layers, config, where, kind)
    config.dtype = kind
    config._name_or_path = str(path_or_name)
    model = skeleton(family.model, config, folder.path)
    check_fits(folder, model)
    return folder, model


def check_backends(
    layers: Sequence[LayerAttention], config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Asks every named backend whether it can do its layers.

    Raises:
        InputError: an unknown backend.
        UnsupportedError: a backend that cannot, with the reason and those that can.
    """
    for number, layer in enumerate(layers):
        if layer.backend == "auto":
            continue
        if layer.backend not in BACKENDS:
            raise InputError(f"layer {number}: unknown backend {layer.backend!r}; known: auto, {', '.join(BACKENDS)}")
        length = config.max_position_embeddings
        problem = Problem(layer.pattern, device.type, dtype, config.head_dim, grad=False, queries=length, slots=length)
        reason = BACKENDS[layer.backend].unsupported(problem)
        if reason is not None:
            able = [name for name, backend in BACKENDS.items() if backend.unsupported(problem) is None]
            raise UnsupportedError(
                f"layer {number}: backend {layer.backend!r} cannot do this: {reason} (these can: {', '.join(able)})"
            )


def _generation_config(path: Path) -> GenerationConfig:
    said = read_json(path)
    try:
        return GenerationConfig.from_dict(said)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())[:200]}") from None


def _shorthand(attn: str | None) -> list[dict[str, Any]]:
    if attn is None or attn == "moba":
        return []
    if attn == "moba_naive":
        return [{"layers": ":", "backend": "reference"}]
    if attn == "full":
        return [{"layers": ":", "pattern": "full", "backend": "auto"}]
    raise InputError(f"attn: want one of {', '.join(SHORTHANDS)}, got {attn!r}")


def _device(device: str | torch.device | None) -> torch.device:
    try:
        return torch.get_default_device() if device is None else torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device: {' '.join(str(error).split())[:120]}") from None


def _dtype(dtype: str | torch.dtype | None, folder: Folder) -> torch.dtype:
    if dtype is None:
        dtype = folder.config.get("dtype") or folder.config.get("torch_dtype")
    if dtype is None:
        sizes: dict[str, int] = {}
        for info in folder.tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        dtype = FLOATS.get(max(sizes, key=lambda name: sizes[name]), "float32") if sizes else "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in (*DTYPES, "float64"):
        raise InputError(f"dtype: want one of {', '.join(DTYPES)}, got {dtype!r}")
    return getattr(torch, name)


@torch.no_grad()
def _read_tensors(
    model: MobaForCausalLM, folder: Folder, device: torch.device, dtype: torch.dtype, progress: Progress | None
) -> None:
    tied, done = model.config.tie_word_embeddings, 0
    for name, info in folder.tensors.items():
        if not is_computed(name) and not (tied and name == HEAD):
            place(model, name, folder.read(name).to(device, dtype, copy=True))
        done += info.nbytes
        if progress is not None:
            progress("load", done, folder.nbytes)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)
    if tied:
        model.tie_weights()
        check_tied(folder, tied=True)


def check_tied(folder: Folder, *, tied: bool) -> None:
    """A head that is stored although it is ``tied`` must be the embedding.

    Raises:
        InputError: it is another tensor.
    """
    if tied and HEAD in folder.tensors and not torch.equal(folder.read(HEAD), folder.read(EMBEDDING)):
        raise InputError(
            f"{folder.path}: tie_word_embeddings is true but {HEAD} differs from {EMBEDDING}; "
            "set it to false in config.json"
        )


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor where a model has a parameter of that name."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, nn.Parameter(tensor))
