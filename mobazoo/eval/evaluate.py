"""One evaluation by its recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mobazoo.checkpoint.ready import ready_model
from mobazoo.checkpoint.tokenizer import load_tokenizer
from mobazoo.config.eval import EvalRecipe
from mobazoo.errors import InputError
from mobazoo.eval.choices import block_choices
from mobazoo.eval.loss import measure_loss
from mobazoo.eval.texts import read_texts
from mobazoo.results import write_result


def evaluate(recipe: EvalRecipe, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Does every task of the recipe on the same texts, and writes the result where the recipe says.

    Returns:
        ``texts`` (how many, and their length), and for each task its own part.

    Raises:
        InputError: a recipe, model or data that cannot be used.
    """
    recipe.check()
    texts = read_texts(recipe.data, load_tokenizer(recipe.model), recipe.length, recipe.documents)
    if recipe.choices is not None and not 0 <= recipe.choices.text < len(texts.names):
        raise InputError(f"eval.choices.text: want 0 to {len(texts.names) - 1}, got {recipe.choices.text}")
    model = ready_model(recipe.model, device=recipe.device, dtype=recipe.dtype, progress=progress)
    limit = model.config.max_position_embeddings
    if recipe.length > limit:
        raise InputError(f"eval.length: want at most {limit}, the positions of {recipe.model}, got {recipe.length}")
    settings = recipe.named_settings()
    found: dict[str, Any] = {"texts": {"count": len(texts.names), "length": recipe.length}}
    if recipe.loss is not None:
        found["loss"] = measure_loss(model, texts.ids, settings, recipe.loss, recipe.batch, progress)
    if recipe.choices is not None:
        task = recipe.choices
        chosen = block_choices(model, texts.ids[task.text], settings[task.setting], task)
        found["choices"] = {"setting": task.setting, "text": texts.names[task.text], **chosen}
    if recipe.dest is not None:
        write_result(recipe.dest, "eval", recipe, found)
    return found
