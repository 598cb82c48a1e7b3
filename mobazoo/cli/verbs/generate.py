"""``mobazoo generate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mobazoo.cli.output import note, progress, size
from mobazoo.cli.work import DryRun, Outcome, Overrides, recipe_or_model, show_plan, would_load
from mobazoo.config.generate import GenerateRecipe
from mobazoo.config.recipe import parse_recipe
from mobazoo.errors import InputError
from mobazoo.files import check_result_place

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
    """Write text after a prompt, which is an option, a file, in the recipe, or stdin."""
    recipe = resolve(model, overrides or [])
    if dry_run:
        show_plan(recipe, plan(recipe))
        return
    _run(recipe, _prompt(prompt, prompt_file, recipe.prompt))


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
    recipe = parse_recipe(recipe_or_model(model, "generate"), overrides, GenerateRecipe)
    check_result_place(recipe.dest)
    recipe.check()
    return recipe


def plan(recipe: GenerateRecipe) -> list[str]:
    """What would happen. A folder that is here is checked; the Hub is not asked."""
    load = would_load(recipe.model, [_rules(recipe)], recipe.device, recipe.dtype)
    lines = [load, f"would write up to {recipe.max_new_tokens} tokens after the prompt"]
    if recipe.prefill_chunk is not None:
        lines.append(f"would read the prompt {recipe.prefill_chunk} tokens at a time")
    if recipe.offload is not None:
        where = "host memory" if recipe.offload == "host" else f"mapped files in {recipe.offload}"
        lines.append(f"would keep keys and values in {where}")
    return [*lines, f"would write {recipe.dest}"] if recipe.dest else lines


def execute(recipe: GenerateRecipe) -> Outcome:
    """As a stage of a run: the prompt is in the recipe.

    Raises:
        InputError: it is not.
    """
    if recipe.prompt is None:
        raise InputError("prompt: missing; as a stage of a run it stands in the recipe")
    report = _run(recipe, recipe.prompt)
    return Outcome(f"{report.new_tokens} tokens after {report.prompt_tokens}", [recipe.dest] if recipe.dest else [])


def _run(recipe: GenerateRecipe, prompt: str) -> Report:
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        print(text, end="", flush=True)

    folder = import_module("mobazoo.checkpoint.hub").locate(recipe.model)
    import_module("mobazoo.checkpoint.folder").open_folder(folder)  # what is no checkpoint is said first
    tokenizer = import_module("mobazoo.checkpoint.tokenizer").load_tokenizer(folder)
    said = {"attention": _rules(recipe), "device": recipe.device, "dtype": recipe.dtype}
    with progress() as update:
        model = import_module("mobazoo.checkpoint.ready").ready_model(folder, progress=update, **said)
    report: Report = import_module("mobazoo.generate").generate(model, tokenizer, prompt, recipe, write)
    print(flush=True)
    for line in summary(report):
        note(line)
    if recipe.dest is not None:
        found = {"generate": {"prompt": prompt, "text": "".join(pieces), **asdict(report)}}
        import_module("mobazoo.results").write_result(recipe.dest, "generate", recipe, found)
    return report


def _rules(recipe: GenerateRecipe) -> list[dict[str, Any]]:
    decode = [] if recipe.decode is None else [{"layers": ":", "decode": recipe.decode}]
    return [*recipe.attention, *decode]


def _prompt(text: str | None, file: Path | None, said: str | None) -> str:
    if text is not None and file is not None:
        raise InputError("--prompt and --prompt-file: want one of them, got both")
    if text is not None or (file is None and said is not None):
        return text if text is not None else str(said)
    try:
        if file is not None:
            return file.read_text("utf-8")
        if sys.stdin.isatty():
            raise InputError("no prompt; give --prompt, --prompt-file, or text on stdin")
        return sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt {file or 'on stdin'}: cannot be read as text: {error}") from None
