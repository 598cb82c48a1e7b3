"""transformers' ``Trainer`` as a run needs it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mobazoo.checkpoint.folder import read_json
from mobazoo.checkpoint.manifest import write_manifest
from mobazoo.checkpoint.staging import staged
from mobazoo.config.train import TrainRecipe
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.train.checkpoints import STATE, TRAINER, checkpoints, identity, name_of, prune
from mobazoo.train.parallel import is_launched
from mobazoo.train.state import load_optimizer, load_random, optimizer_state, random_state, whole_weights, write_state

Write = Callable[[Path, dict[str, Tensor]], None]
_SCHEDULES = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}


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
    if is_launched() and recipe.device == "cpu":
        given |= {"ddp_backend": "gloo"}
    args = TrainingArguments(**given)
    if args.n_gpu > 1:
        raise InputError(
            f"train: one process sees {args.n_gpu} GPUs; launch one for each (torchrun --nproc-per-node {args.n_gpu} "
            "-m mobazoo train ...), or choose one by CUDA_VISIBLE_DEVICES"
        )
    groups, odd = divmod(args.world_size, recipe.sequence)
    if odd:
        raise InputError(
            f"train.sequence: {args.world_size} processes are no multiple of {recipe.sequence}; launch with torchrun, "
            "as many as share a row or a multiple"
        )
    share, rest = divmod(recipe.batch, groups)
    micro = recipe.micro_batch or share
    if rest or share % max(micro, 1):
        raise InputError(
            f"train.batch: {recipe.batch} rows do not divide over {groups} processes in forwards of "
            f"{micro or 1}; choose a multiple"
        )
    args.per_device_train_batch_size, args.gradient_accumulation_steps = micro, share // micro
    return args


class Finite(TrainerCallback):
    """Stops before a step that would spoil the weights.

    Args:
        work: the run's folder, whose newest checkpoint the message names.
    """

    def __init__(self, work: Path) -> None:
        self.work = work

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
            InputError: saying at which step, and from where to go on.
        """
        assert model is not None
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm):
            return
        last = next(iter(checkpoints(self.work)), None)
        where = "there is no checkpoint before it" if last is None else f"the last good checkpoint is {last}"
        raise InputError(
            f"train: loss or gradients are not finite at step {state.global_step + 1}, and nothing of that step was "
            f"kept; {where}; lower learning_rate, or look at the data"
        )


class Runner(Trainer):
    """A ``Trainer`` whose checkpoints are complete or not there.

    Args:
        work: folder of the run.
        write: writes the weights into a folder, given to it with those of all processes.
        recipe: of the run.
        **given: see ``Trainer``.
    """

    def __init__(self, work: Path, write: Write, recipe: TrainRecipe, **given: Any) -> None:
        super().__init__(**given)
        self.work, self.write, self.recipe = work, write, recipe
        if is_launched() and recipe.shard and not vars(self).get("is_distributed_loading_by_transformers"):
            raise UnsupportedError("train.shard: this transformers would copy the model; take 5.23, or set shard=false")
        self.remove_callback(PrinterCallback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """transformers' own, without keeping logits."""
        whole = {**inputs, "loss_only": True}
        return super().compute_loss(model, whole, return_outputs, num_items_in_batch)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        inner = self._inner()
        weights = whole_weights(inner)
        optimizer = optimizer_state(inner, self._optimizer())
        randoms = random_state()
        if self.is_world_process_zero():
            step = self.state.global_step
            said = {
                "recipe": identity(self.recipe),
                "step": step,
                "processes": self.args.world_size,
                "learning_rate": self._schedule().state_dict(),
            }
            with staged(self.work / name_of(step), replace=True) as new:
                self.write(new, weights)
                write_state(new, optimizer, randoms, said)
                self.state.save_to_json(str(new / TRAINER))
                write_manifest(new)
            prune(self.work, self.recipe.keep)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Gradients of a sharded model wait for the last forward of a step; transformers' own asks its own config."""
        sharded = next(module for module in self._inner().modules() if isinstance(module, FSDPModule))
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: the model was made with the checkpoint's weights."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(Path(checkpoint), self._inner(), self._optimizer())
        self._schedule().load_state_dict(read_json(Path(checkpoint, STATE))["learning_rate"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random(Path(checkpoint), self.args.process_index)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: bfloat16 needs none."""

    def _inner(self) -> nn.Module:
        inner: nn.Module = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return inner

    def _schedule(self) -> LRScheduler:
        assert self.lr_scheduler is not None
        return self.lr_scheduler

    def _optimizer(self) -> Optimizer:
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


class Saver(TrainerCallback):
    """Saves every so often, and when the process is asked to end.

    Args:
        every: steps between checkpoints (None: none).
    """

    def __init__(self, every: int | None) -> None:
        self.every = every
        self.asked = self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM as a wish to stop after the step that is running."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals belong to the main thread
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Asks for a checkpoint, of all processes at the same step."""
        stop = self.asked
        if args.world_size > 1:
            wish = torch.tensor(float(stop), device=args.device)
            distributed.all_reduce(wish, op=distributed.ReduceOp.MAX)
            stop = bool(wish.item())
        last = state.global_step == state.max_steps
        if last:
            control.should_log = True
        if stop and not last:
            self.stopped = control.should_training_stop = True
        if not last and (stop or (self.every and state.global_step % self.every == 0)):
            # A line of the log covers the steps since the one before: end it here, as an unbroken run does.
            control.should_log = control.should_save = True
