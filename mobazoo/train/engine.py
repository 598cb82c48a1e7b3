"""transformers' ``Trainer`` as a run needs it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mobazoo.config.train import TrainRecipe
from mobazoo.data.collate import Collator
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.train.order import Order

_SCHEDULES = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}


def require_accelerate() -> None:
    """Refuses to begin without accelerate.

    Raises:
        UnsupportedError: naming the extra that brings it.
    """
    if find_spec("accelerate") is None:
        raise UnsupportedError("training needs accelerate, which is not here; pip install 'mobazoo[train]'")


def arguments(recipe: TrainRecipe, folder: Path) -> TrainingArguments:
    """The recipe in transformers' words.

    Raises:
        InputError: a batch that does not divide over the processes, or several GPUs in one process.
    """
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": recipe.total_steps,
        "learning_rate": recipe.learning_rate,
        "warmup_steps": round(recipe.warmup * recipe.total_steps),
        "lr_scheduler_type": _SCHEDULES[recipe.decay],
        "lr_scheduler_kwargs": {"min_lr_rate": recipe.floor} if recipe.decay == "cosine" else None,
        "weight_decay": recipe.weight_decay,
        "adam_beta2": recipe.beta2,
        "max_grad_norm": recipe.clip,
        "bf16": recipe.mixed,
        "seed": recipe.seed,
        "use_cpu": recipe.device == "cpu",
        "torch_compile": recipe.compile,
        "logging_steps": recipe.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": recipe.device != "cpu" and torch.cuda.is_available(),
        "accelerator_config": {"use_seedable_sampler": False, "even_batches": True},
    }
    args = TrainingArguments(**given)
    if args.n_gpu > 1:
        raise InputError(
            f"train: one process sees {args.n_gpu} GPUs; launch one for each (torchrun --nproc-per-node {args.n_gpu} "
            "-m mobazoo train ...), or choose one by CUDA_VISIBLE_DEVICES"
        )
    share, rest = divmod(recipe.batch, args.world_size)
    micro = recipe.micro_batch or share
    if rest or share % max(micro, 1):
        raise InputError(
            f"train.batch: {recipe.batch} rows do not divide over {args.world_size} processes in forwards of "
            f"{micro or 1}; choose a multiple"
        )
    args.per_device_train_batch_size, args.gradient_accumulation_steps = micro, share // micro
    return args


class Finite(TrainerCallback):
    """Stops before a step that would spoil the weights."""

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Looks at the norm of all gradients, which is not finite if the loss is not.

        Raises:
            InputError: saying at which step.
        """
        assert model is not None
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise InputError(
                f"train: loss or gradients are not finite at step {state.global_step + 1}; nothing of that step was "
                "kept; lower learning_rate, or look at the data there"
            )


def make_trainer(
    model: nn.Module, recipe: TrainRecipe, args: TrainingArguments, order: Order, callbacks: list[TrainerCallback]
) -> Trainer:
    """A trainer over the run's rows that prints nothing itself."""
    collator = Collator(recipe.length, fixed=recipe.compile)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=order, callbacks=[Finite(), *callbacks])
    trainer.remove_callback(PrinterCallback)
    return trainer
