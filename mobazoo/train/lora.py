"""Low-rank adapters (LoRA, arXiv 2106.09685) by peft: the weights stay, small matrices beside them are learned."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mobazoo.config.train import Lora
from mobazoo.errors import InputError
from mobazoo.nn.causal_lm import MobaForCausalLM

ADAPTER = "adapter.safetensors"


def check_targets(model: MobaForCausalLM, lora: Lora) -> None:
    """Looks for the projections that get adapters.

    Raises:
        InputError: a target that no module of the model is called.
    """
    known = {name.rpartition(".")[2] for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    for target in lora.targets:
        if target not in known:
            raise InputError(
                f"train.lora.targets: no projection is called {target!r}; known: {', '.join(sorted(known))}"
            )


def adapted(model: MobaForCausalLM, lora: Lora) -> Any:
    """The model with adapters beside its projections, which alone are trained."""
    peft = import_module("peft")
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def write_adapter(folder: Path, weights: dict[str, Tensor]) -> None:
    """Writes the weights that are trained."""
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / ADAPTER)


def read_adapter(folder: Path, model: nn.Module) -> None:
    """Puts adapters back.

    Raises:
        InputError: they are of another model.
    """
    weights = load_file(folder / ADAPTER)
    want = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if weights.keys() != want:
        raise InputError(f"{folder / ADAPTER}: has other adapters than the recipe asks for; use resume=false")
    model.load_state_dict(weights, strict=False)


def merged(model: Any) -> MobaForCausalLM:
    """The model with its adapters added into its weights, none of which is frozen any more.

    Every process must ask where weights are sharded.
    """
    whole: MobaForCausalLM = model.merge_and_unload()
    return whole.requires_grad_(True)
