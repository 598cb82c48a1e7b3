"""One run: trained if need be, and measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mobazoo.checkpoint.place import METRICS
from mobazoo.checkpoint.ready import ready_model
from mobazoo.config.eval import EvalRecipe, LossTask
from mobazoo.eval.evaluate import evaluate
from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.results import write_result
from mobazoo.train import train
from tools.study.corpus import Asked
from tools.study.recipe import Run, Study

Progress = Callable[[str, int, int], None]


def do(study: Study, run: Run, questions: Sequence[Asked], progress: Progress, log: Callable[[str], None]) -> None:
    """Trains a run from where it was interrupted, measures it, and writes its result."""
    length, dest = run.recipe.length, Path(run.recipe.dest)
    if not dest.is_dir():  # it appears whole or not at all
        train(run.recipe, progress, log)
    asks = EvalRecipe(
        run.recipe.dest,
        replace(study.source, split="validation"),
        length=length,
        documents=study.documents,
        batch=1,
        loss=LossTask(buckets=min(8, length // 8), trailing=length // 4),
        device=run.recipe.device,
    )
    found = evaluate(asks, progress)
    model = ready_model(run.recipe.dest, device=run.recipe.device)
    result: dict[str, Any] = {
        "arm": run.arm,
        "seed": run.seed,
        "train_seconds": round(trained_for(dest), 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "texts": found["texts"],
        "loss": found["loss"]["settings"]["as it is"],
        "recall": recall(model, questions, progress),
    }
    write_result(run.result, "study", run.recipe, result)


def trained_for(folder: Path) -> float:
    """Seconds of all training steps, by the rates in its log; an interrupted run has them too."""
    seconds, before = 0.0, 0
    for line in (folder / METRICS).read_text("utf-8").splitlines():
        said = json.loads(line)
        if "tokens" in said:
            seconds += (said["tokens"] - before) / said["tokens_per_second"]
            before = said["tokens"]
    return seconds


@torch.no_grad()
def recall(model: MobaForCausalLM, questions: Sequence[Asked], progress: Progress) -> dict[str, Any]:
    """The share of questions whose whole answer is the likeliest next token, with everything before it given."""
    right = count = 0
    for done, document in enumerate(questions, 1):
        ids = torch.tensor([document.ids], device=model.device)
        likeliest = model(ids, use_cache=False).logits[0].argmax(-1).tolist()
        for places in document.answers:
            right += all(likeliest[place - 1] == document.ids[place] for place in places)
            count += 1
        progress("recall", done, len(questions))
    return {"right": right, "asked": count, "share": right / count}
