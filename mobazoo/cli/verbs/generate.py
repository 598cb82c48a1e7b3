"""``mobazoo generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mobazoo.cli.output import note, size
from mobazoo.cli.work import DryRun, Overrides, show_plan
from mobazoo.config.generate import GenerateRecipe
from mobazoo.config.recipe import parse_recipe
from mobazoo.config.rules import DECODES
from mobazoo.config.shipped import RECIPES, Source, find, shipped
from mobazoo.errors import InputError

if TYPE_CHECKING:
    from mobazoo.generate import Report

PLACE = ("2 Work", 3)
EXAMPLES = """Example: mobazoo generate ./Llama-3.1-8B-moba --prompt 'Once upon a time' max_new_tokens=100

Example: cat book.txt question.txt | mobazoo generate ./Qwen3-8B-moba temperature=0 decode=moba prefill_chunk=8192"""


def main(
    model: Annotated[str, typer.Argument(metavar="RECIPE|FOLDER", help="A recipe, a checkpoint folder or a Hub id.")],
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The prompt itself.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", "-f", help="A text file to read it from.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write text after a prompt, which is an option, a file or stdin."""
    recipe = resolve(model, overrides or [])
    if dry_run:
        show_plan(recipe, plan(recipe))
        return
    text = _prompt(prompt, prompt_file)
    loaded, tokenizer = _load(recipe)
    report: Report = import_module("mobazoo.generate").generate(loaded, tokenizer, text, recipe, _write)
    print(flush=True)
    for line in summary(report):
        note(line)


def summary(report: Report) -> list[str]:
    """What is said at the end."""
    decode = report.decode_rate
    return [
        f"{report.prompt_tokens} tokens read in {report.prefill_seconds:.2f} s ({report.prefill_rate:.1f}/s), "
        f"{report.new_tokens} written" + (f" ({decode:.1f}/s)" if decode is not None else ""),
        f"{report.keys_per_token:.0f} keys read per token and head, mean over layers; "
        f"peak memory {size(report.peak_bytes)}",
    ]


def resolve(model: str, overrides: Sequence[str]) -> GenerateRecipe:
    """A recipe by path or name, or one that says no more than the model.

    Raises:
        InputError: settings that no run could use.
    """
    recipe = _parse(model, overrides)
    if recipe.prefill_chunk is not None and recipe.prefill_chunk < 1:
        raise InputError(f"prefill_chunk: want at least 1 token, got {recipe.prefill_chunk}")
    if recipe.decode not in (None, *DECODES):
        raise InputError(f"decode: want {' or '.join(DECODES)}, got {recipe.decode!r}")
    return recipe


def _parse(model: str, overrides: Sequence[str]) -> GenerateRecipe:
    is_recipe = Path(model).is_file() or model.endswith(".yaml") or f"generate/{model}" in shipped(RECIPES)
    if is_recipe or model in shipped(RECIPES):
        return parse_recipe(find(model, RECIPES, "generate"), overrides, GenerateRecipe)
    return parse_recipe(Source(model, model, f"model: {json.dumps(model)}"), overrides, GenerateRecipe)


def plan(recipe: GenerateRecipe) -> list[str]:
    """What would happen."""
    lines = [f"would load {recipe.model} and write up to {recipe.max_new_tokens} tokens after the prompt"]
    if recipe.prefill_chunk is not None:
        lines.append(f"would read the prompt {recipe.prefill_chunk} tokens at a time")
    if recipe.offload is not None:
        where = "host memory" if recipe.offload == "host" else f"mapped files in {recipe.offload}"
        lines.append(f"would keep keys and values in {where}")
    return lines


def _prompt(text: str | None, file: Path | None) -> str:
    if text is not None and file is not None:
        raise InputError("--prompt and --prompt-file: want one of them, got both")
    if text is not None:
        return text
    try:
        if file is not None:
            return file.read_text("utf-8")
        if sys.stdin.isatty():
            raise InputError("no prompt; give --prompt, --prompt-file, or text on stdin")
        return sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt {file or 'on stdin'}: cannot be read as text: {error}") from None


def _load(recipe: GenerateRecipe) -> tuple[Any, Any]:
    given = {"attention": recipe.attention or None, "dtype": recipe.dtype}
    device = recipe.device
    if device == "auto":
        device = "cuda" if import_module("torch").cuda.is_available() else "cpu"
    folder = import_module("mobazoo.checkpoint.hub").locate(recipe.model)
    said = {name: value for name, value in given.items() if value is not None}
    loaded = import_module("mobazoo.checkpoint.load").load(folder, device=device, **said)
    if recipe.decode is not None:
        rules = (loaded.config.moba or {}).get("attention") or []
        loaded.set_attention([*rules, {"layers": ":", "decode": recipe.decode}])
    try:
        tokenizer = import_module("transformers").AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no tokenizer that loads: {str(error).splitlines()[0]}") from None
    return loaded, tokenizer


def _write(text: str) -> None:
    print(text, end="", flush=True)
