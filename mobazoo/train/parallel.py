"""Several processes: weights sharded over them (FSDP2), rows shared between them."""

from __future__ import annotations

import os

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.nn.sequence import RowShare


def is_launched() -> bool:
    """Whether this is one of several processes, started by torchrun or accelerate."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def shard(model: MobaForCausalLM, device: torch.device) -> None:
    """Splits every weight over all processes, layer by layer.

    accelerate would do it on GPUs, and on CPUs keep whole copies without a word; so this is done here, for both alike.
    ``Trainer`` is told that the model came sharded and leaves it as it is. Adapters must be there before; each is
    sharded with its layer.
    """
    nn.Module.to(model, device=device)  # transformers' own is typed away
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model._is_distributed_loading_by_transformers = True


def share_rows(model: MobaForCausalLM, size: int) -> None:
    """Makes each ``size`` processes in a row share rows."""
    if size == 1:
        return
    rank = distributed.get_rank()
    for first in range(0, distributed.get_world_size(), size):
        group = distributed.new_group(list(range(first, first + size)))  # every process must take part in each
        if first <= rank < first + size:
            model.model.sequence = RowShare(group, rank - first, size)
