"""One evaluation by its recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mobazoo.checkpoint.ready import ready_model
from mobazoo.checkpoint.tokenizer import load_tokenizer
from mobazoo.config.eval import EvalRecipe
from mobazoo.errors import InputError
from mobazoo.eval.choices import block_choices
from mobazoo.eval.harness import find_tasks, measure_tasks
from mobazoo.eval.loss import measure_loss
from mobazoo.eval.recall import measure_recall
from mobazoo.eval.texts import read_texts
from mobazoo.parts import Parts
from mobazoo.results import write_result


def evaluate(recipe: EvalRecipe, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Does every task of the recipe on the same texts, and writes the result where the recipe says.

    With ``dest`` an interrupted evaluation goes on where it was, part by part.

    Returns:
        ``texts`` (how many, and their length) where a task reads them, and for each task its own part.

    Raises:
        InputError: a recipe, model or data that cannot be used.
        UnsupportedError: a library that the recipe needs is not here.
    """
    recipe.check()
    recipe.require()
    tasks = find_tasks(recipe.lm_eval) if recipe.lm_eval is not None else {}
    tokenizer = load_tokenizer(recipe.model)
    settings, parts = recipe.named_settings(), Parts(recipe.dest, recipe, recipe.model)
    found: dict[str, Any] = {}
    texts = None
    if recipe.loss is not None or recipe.choices is not None:
        texts = read_texts(recipe.data, tokenizer, recipe.length, recipe.documents)
        found["texts"] = {"count": len(texts.names), "length": recipe.length}
    if texts is not None and recipe.choices is not None and not 0 <= recipe.choices.text < len(texts.names):
        raise InputError(f"eval.choices.text: want 0 to {len(texts.names) - 1}, got {recipe.choices.text}")
    model = ready_model(recipe.model, device=recipe.device, dtype=recipe.dtype, progress=progress)
    limit = model.config.max_position_embeddings
    if texts is not None and recipe.length > limit:
        raise InputError(f"eval.length: want at most {limit}, the positions of {recipe.model}, got {recipe.length}")
    if texts is not None and recipe.loss is not None:
        ids, task = texts.ids, recipe.loss
        found["loss"] = parts.get("loss", lambda: measure_loss(model, ids, settings, task, recipe.batch, progress))
    if texts is not None and recipe.choices is not None:
        asked = recipe.choices
        chosen = block_choices(model, texts.ids[asked.text], settings[asked.setting], asked)
        found["choices"] = {"setting": asked.setting, "text": texts.names[asked.text], **chosen}
    if recipe.recall is not None:
        found["recall"] = measure_recall(model, tokenizer, recipe, parts, progress)
    if recipe.lm_eval is not None:
        found["lm_eval"] = measure_tasks(model, tokenizer, recipe, tasks, parts, progress)
    if recipe.dest is not None:
        write_result(recipe.dest, "eval", recipe, found)
        parts.done()
    return found
