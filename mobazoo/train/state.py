"""All that a run needs besides weights to go on as if it had never stopped: safetensors and JSON, no pickle."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from mobazoo.checkpoint.folder import read_json
from mobazoo.checkpoint.write import write_json
from mobazoo.errors import InputError
from mobazoo.train.checkpoints import STATE, TENSORS


def options(model: nn.Module) -> StateDictOptions:
    """Whole tensors on the CPU, whatever way they are sharded; of frozen weights nothing."""
    frozen = any(not parameter.requires_grad for parameter in model.parameters())
    return StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=frozen)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights by name; every process must ask, the first one gets them."""
    weights: dict[str, Any] = get_model_state_dict(model, options=options(model))
    return weights


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of the optimizer by parameter name; every process must ask, the first one gets them."""
    whole: dict[str, Any] = dict(get_optimizer_state_dict(model, optimizer, options=options(model)))
    tensors = {
        f"{kind}/{name}": value.contiguous()
        for name, kinds in whole.get("state", {}).items()
        for kind, value in kinds.items()
    }
    return tensors, {"param_groups": whole.get("param_groups", [])}


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every random number generator of all processes."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    kind, keys, at, has_gauss, gauss = np.random.get_state()
    said = {"python": random.getstate(), "numpy": [kind, [int(key) for key in keys], at, has_gauss, gauss]}
    gathered: list[Any] = [(tensors, said)]
    if distributed.is_initialized():
        gathered = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, (tensors, said))
    named = {f"{rank}.{name}": value for rank, one in enumerate(gathered) for name, value in one[0].items()}
    return named, {str(rank): one[1] for rank, one in enumerate(gathered)}


def write_state(
    folder: Path,
    optimizer: tuple[dict[str, Tensor], dict[str, Any]],
    randoms: tuple[dict[str, Tensor], dict[str, Any]],
    said: dict[str, Any],
) -> None:
    """Writes optimizer, random generators and ``said`` into a folder."""
    tensors = {f"optimizer.{name}": value for name, value in optimizer[0].items()}
    tensors |= {f"random.{name}": value for name, value in randoms[0].items()}
    save_file(tensors, folder / TENSORS)
    write_json(folder / STATE, {**said, "optimizer": optimizer[1], "random": randoms[1]})


def load_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Puts an optimizer's state back.

    Raises:
        InputError: the state of a parameter is missing.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / TENSORS).items():
        if key.startswith("optimizer."):
            kind, _, name = key.removeprefix("optimizer.").partition("/")
            state.setdefault(name, {})[kind] = value
    groups = read_json(folder / STATE)["optimizer"]["param_groups"]
    wanted = {name for group in groups for name in group["params"]}
    kinds = {kind for found in state.values() for kind in found}
    for name in sorted(wanted):
        if state.get(name, {}).keys() != kinds:
            raise InputError(
                f"{folder / TENSORS}: has no whole optimizer state of {name}; begin anew with resume=false"
            )
    whole: Any = {"state": state, "param_groups": groups}
    set_optimizer_state_dict(model, optimizer, whole, options=options(model))


def load_random(folder: Path, rank: int) -> bool:
    """Puts the random generators of a process back; False if it had none, being of another process count."""
    said = read_json(folder / STATE)["random"].get(str(rank))
    if said is None:
        return False
    tensors = load_file(folder / TENSORS)
    torch.set_rng_state(tensors[f"random.{rank}.torch"])
    if torch.cuda.is_available() and f"random.{rank}.cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"random.{rank}.cuda"])
    version, keys, gauss = said["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(said["numpy"]))
    return True
