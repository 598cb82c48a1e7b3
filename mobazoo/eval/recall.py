"""Finding what a long text hides, by length of the text and depth of the place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mobazoo.config.eval import EvalRecipe
from mobazoo.errors import InputError
from mobazoo.eval.haystack import Haystack, Question, pose
from mobazoo.eval.settings import setting
from mobazoo.metrics import estimate
from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.parts import Parts

Progress = Callable[[str, int, int], None]

SPARE = 8  # tokens a reply may have beyond the longest that is wanted


def measure_recall(
    model: MobaForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: EvalRecipe, parts: Parts, progress: Progress
) -> dict[str, Any]:
    """Score and loss of the answer for every setting, task, length and depth.

    The prompts of a cell are the same for every setting. A reply is written greedily and scored by ``score``; the loss
    is that of the expected reply, token by token, which tells settings apart long before replies become right.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        recipe: with ``recall``.
        parts: cells that were measured before, and where new ones are kept.
        progress: told ``("recall, <setting>", cells done, cells)``.

    Raises:
        InputError: texts that are too short, or prompts that the model has no positions for.
    """
    task = recipe.recall
    assert task is not None
    haystack = Haystack.read(recipe.data, tokenizer, max(task.lengths))
    grid = list(product(task.tasks, task.lengths, task.depths))
    found: dict[str, Any] = {}
    for name, rules in recipe.named_settings().items():
        cells = []
        with setting(model, rules):
            for done, (kind, length, depth) in enumerate(grid, 1):
                questions = [
                    pose(kind, haystack, length, depth, task, random.Random(f"{kind} {length} {depth} {i}"), i)
                    for i in range(task.samples)
                ]
                check_positions(model, questions, length)
                key = f"recall {name} {kind} {length} {depth}"
                said = parts.get(key, partial(_cell, model, tokenizer, questions, recipe.batch))
                cells.append({"task": kind, "length": length, "depth": depth, **said})
                progress(f"recall, {name}", done, len(grid))
        found[name] = cells
    return {"samples": task.samples, "settings": found}


def score(reply: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in a reply, in any order and case (RULER, arXiv 2404.06654).

    Example:
        >>> score("It is ab12, I think.", ["AB12", "CD34"])
        0.5
    """
    return sum(answer.lower() in reply.lower() for answer in answers) / len(answers)


def check_positions(
    model: MobaForCausalLM, questions: Sequence[Question], length: int, where: str = "eval.recall.lengths"
) -> None:
    """Refuses prompts and replies that the model has no positions for.

    Raises:
        InputError: too long.
    """
    limit = model.config.max_position_embeddings
    need = length + max(len(question.reply) for question in questions) + SPARE
    if need > limit:
        raise InputError(
            f"{where}: {length} tokens and a reply need {need} positions, the model has {limit}; "
            "give shorter lengths, or convert the model to a longer context"
        )


def _cell(
    model: MobaForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], batch: int
) -> dict[str, Any]:
    scores: list[float] = []
    losses: list[float] = []
    for at in range(0, len(questions), batch):
        some = questions[at : at + batch]
        scores += [score(reply, one.answers) for reply, one in zip(_replies(model, tokenizer, some), some, strict=True)]
        losses += _losses(model, some)
    return {"score": asdict(estimate(torch.tensor(scores))), "loss": asdict(estimate(torch.tensor(losses)))}


@contextmanager
def greedy(model: MobaForCausalLM) -> Iterator[None]:
    """The model without its checkpoint's generation settings but for its end tokens.

    A penalty on repeated tokens, which some carry, is one on the answer, which stands in the prompt.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own


@torch.no_grad()
def _replies(model: MobaForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[str]:
    """What the model writes after each prompt; all prompts are equally long, so there is no padding."""
    ids = torch.tensor([question.prompt for question in questions], device=model.device)
    new = max(len(question.reply) for question in questions) + SPARE
    with greedy(model):
        out: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=tokenizer.eos_token_id
        )
    return [str(tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True)) for row in out]


@torch.no_grad()
def _losses(model: MobaForCausalLM, questions: Sequence[Question]) -> list[float]:
    """Mean loss of each expected reply; what fills shorter ones up stands after them, where nothing sees it."""
    length, longest = len(questions[0].prompt), max(len(question.reply) for question in questions)
    rows = [[*one.prompt, *one.reply, *[0] * (longest - len(one.reply))] for one in questions]
    ids = torch.tensor(rows, device=model.device)
    hidden = model.model(ids, use_cache=False, decode_from=length).last_hidden_state[:, length - 1 : -1]
    logits = model.lm_head(hidden).float()
    losses = cross_entropy(logits.transpose(1, 2), ids[:, length:], reduction="none")
    return [float(row[: len(one.reply)].mean()) for row, one in zip(losses, questions, strict=True)]
