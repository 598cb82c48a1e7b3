"""Tasks of lm-eval: its own, the user's, and our synthetic ones as a task folder. Imports it only when it is asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from mobazoo.config.eval import EvalRecipe, LmEvalTask, RecallTask
from mobazoo.config.keys import nearest
from mobazoo.errors import InputError
from mobazoo.eval.haystack import Haystack, pose
from mobazoo.eval.recall import SPARE, check_positions, greedy, score
from mobazoo.eval.settings import setting
from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.parts import Parts

Progress = Callable[[str, int, int], None]

_LENGTHS = "eval.lm_eval.synthetic.lengths"
_CALLS = ("loglikelihood", "loglikelihood_rolling", "generate_until")


def find_tasks(asked: LmEvalTask) -> dict[str, Any]:
    """The task manager of lm-eval that knows each task that is named; its own thousands of files are read last.

    Raises:
        InputError: a task that is not there.
    """
    if not asked.tasks:
        return {}
    own = [] if asked.include is None else [str(Path(asked.include).expanduser())]
    manager = _manager(own, defaults=not own)
    if own and not set(asked.tasks) <= set(manager.all_tasks):
        manager = _manager(own, defaults=True)
    for name in asked.tasks:
        if name not in manager.all_tasks:
            where = f" or {asked.include}" if asked.include is not None else ""
            hint = nearest(name, manager.all_tasks, "`lm_eval ls tasks` lists lm-eval's")
            raise InputError(f"eval.lm_eval.tasks: unknown task {name!r} in lm-eval{where}; {hint}")
    return dict.fromkeys(asked.tasks, manager)


def measure_tasks(
    model: MobaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: EvalRecipe,
    named: Mapping[str, Any],
    parts: Parts,
    progress: Progress,
) -> dict[str, Any]:
    """Every task under every setting, through lm-eval's own Hugging Face model object.

    Args:
        model: in eval mode.
        tokenizer: the model's.
        recipe: with ``lm_eval``.
        named: as ``find_tasks`` gave them.
        parts: tasks that were measured before, and where new ones are kept.
        progress: told ``("lm-eval, <setting>", tasks done, tasks)``.

    Returns:
        ``version`` of lm-eval, and ``settings``: for each task ``samples`` and ``metrics`` with ``value`` and ``error``
        (None where lm-eval gives no standard error).

    Raises:
        InputError: a task that does not load, texts that are too short.
    """
    asked = recipe.lm_eval
    assert asked is not None
    found: dict[str, Any] = {}
    with TemporaryDirectory(prefix="mobazoo-tasks-") as folder:
        tasks, synthetic = dict(named), []
        if asked.synthetic is not None:
            haystack = Haystack.read(recipe.data, tokenizer, max(asked.synthetic.lengths), where=_LENGTHS)
            synthetic = write_tasks(Path(folder), model, tokenizer, haystack, asked.synthetic)
            tasks |= dict.fromkeys(synthetic, _manager([folder], defaults=False))
        wrapped = import_module("lm_eval.models.huggingface").HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=recipe.batch
        )
        for call in _CALLS:  # progress is told here, task by task
            setattr(wrapped, call, partial(getattr(wrapped, call), disable_tqdm=True))
        for name, rules in recipe.named_settings().items():
            found[name] = {}
            with setting(model, rules):
                for done, (task, manager) in enumerate(tasks.items(), 1):
                    key = f"lm_eval {name} {task}"
                    with greedy(model) if task in synthetic else nullcontext():  # as ``eval recall`` asks
                        found[name] |= parts.get(key, partial(_evaluated, wrapped, manager, task, asked.limit))
                    progress(f"lm-eval, {name}", done, len(tasks))
    return {"version": version("lm_eval"), "settings": found}


def write_tasks(
    folder: Path,
    model: MobaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    haystack: Haystack,
    task: RecallTask,
) -> list[str]:
    """A task folder as lm-eval reads it: for each kind and length a YAML file and its prompts as JSON lines.

    Args:
        folder: exists.
        model: whose positions the prompts have to fit.
        tokenizer: the model's.
        haystack: what hides the needles.
        task: what to write.

    Returns:
        The tasks' names, ``mobazoo_needle_1024``.

    Raises:
        InputError: prompts that the model has no positions for.
    """
    names = []
    for kind, length in product(task.tasks, task.lengths):
        rows, most = [], 0
        for depth, number in product(task.depths, range(task.samples)):
            source = Random(f"{kind} {length} {depth} {number}")
            question = pose(kind, haystack, length, depth, task, source, number, _LENGTHS)
            check_positions(model, [question], length, _LENGTHS)
            prompt = tokenizer.decode(question.prompt[len(haystack.begin) :])
            said = {"prompt": prompt, "reply": tokenizer.decode(question.reply), "answers": question.answers}
            rows.append({**said, "depth": depth})
            most = max(most, len(question.reply))
        name = f"mobazoo_{kind}_{length}"
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(_task_file(name, data, folder, most + SPARE), encoding="utf-8")
        names.append(name)
    return names


def found_answers(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """What the task files name as ``process_results``: the share of the answers that stand in a reply."""
    return {"found": score(results[0], doc["answers"])}


def _task_file(name: str, data: Path, folder: Path, most: int) -> str:
    said = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{reply}}",
        "target_delimiter": "",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": most},
        "metric_list": [{"metric": "found", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    return f"{yaml.safe_dump(said, sort_keys=False)}process_results: !function {__name__}.{found_answers.__name__}\n"


def _manager(places: Sequence[str], *, defaults: bool) -> Any:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that is loaded already
    return import_module("lm_eval.tasks").TaskManager(include_path=list(places), include_defaults=defaults)


def _evaluated(wrapped: Any, manager: Any, name: str, limit: int | None) -> dict[str, Any]:
    """A task, or the tasks of a group."""
    try:
        loaded = manager.load([name])
    except Exception as error:  # its files are read by several libraries, each with errors of its own
        why = " ".join(str(error).split())
        raise InputError(f"eval.lm_eval.tasks: {name} does not load: {type(error).__name__}: {why}") from None
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    said = import_module("lm_eval.evaluator").evaluate(
        lm=wrapped, task_dict=loaded, limit=limit, log_samples=False, bootstrap_iters=1000
    )
    return {
        task: {"samples": said["n-samples"][task]["effective"], "metrics": _metrics(said["results"][task])}
        for task in loaded["tasks"]
    }


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """``{"acc,none": 0.5, "acc_stderr,none": 0.1}`` by metric; a filter's name stays where it is not ``none``."""
    found = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = results.get(f"{metric}_stderr,{kind}")
        name = metric if kind == "none" else f"{metric}, {kind}"
        found[name] = {"value": float(value), "error": float(error) if isinstance(error, int | float) else None}
    return found
