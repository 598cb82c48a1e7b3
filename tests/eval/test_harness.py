"""lm-eval: our models through its model object, without a network; its figures are ours where both measure the same."""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mobazoo import extras
from mobazoo.cli import app
from mobazoo.config.data import Data
from mobazoo.config.eval import EvalRecipe, LmEvalTask, RecallTask
from mobazoo.eval import harness, recall
from mobazoo.eval.evaluate import evaluate
from tests.small import FULL, plain_checkpoint, refusal, zoo_checkpoint

SYNTHETIC = RecallTask(["needle", "tracking"], [200], [0.0, 1.0], samples=1)


def quiet(*_: Any) -> None: ...


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_DATASETS_OFFLINE=1, and no connection besides."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return zoo_checkpoint(plain_checkpoint(folder / "plain", positions=300), folder / "zoo")


@pytest.fixture(scope="module")
def hay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hay")
    (folder / "a.txt").write_text("the quick brown fox " * 30)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small task folder of a user: the likelier of two endings."""
    folder = tmp_path_factory.mktemp("own")
    rows = [
        {"q": "abc" * 30, "choices": [" d", " eeee"], "label": 0},
        {"q": "the quick " * 9, "choices": [" fox", " x"], "label": 1},
        {"q": "what is it", "choices": [" a", " b"], "label": 0},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "endings.yaml").write_text(f"""
task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "rows.jsonl"}}}, cache_dir: {folder / "cache"}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
    (folder / "torn.yaml").write_text(f"""
task: torn
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder / "gone.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_target: label
""")
    return folder


def recipe(model: Path, hay: Path, task: LmEvalTask | None, **changes: Any) -> EvalRecipe:
    return replace(EvalRecipe(str(model), Data(str(hay)), loss=None, lm_eval=task), **changes)


def test_a_users_task_scores_what_transformers_would(model: Path, hay: Path, own: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"full": FULL, "moba": []}
    asked = recipe(model, hay, LmEvalTask(["endings"], str(own)), settings=settings, dest=str(tmp_path / "out.json"))
    found = evaluate(asked, quiet)["lm_eval"]
    said = found["settings"]["full"]["endings"]
    assert said["samples"] == 3
    theirs = LlamaForCausalLM.from_pretrained(model.parent / "plain")
    tokenizer = AutoTokenizer.from_pretrained(model.parent / "plain")
    right = []
    for row in map(json.loads, (own / "rows.jsonl").read_text().splitlines()):
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(row["q"] + choice)["input_ids"]])
            begin = len(tokenizer(row["q"])["input_ids"])
            with torch.no_grad():
                logs = log_softmax(theirs(ids).logits[0, begin - 1 : -1], -1)
            scores.append(float(logs.gather(1, ids[0, begin:, None]).sum()))
        right.append(scores.index(max(scores)) == row["label"])
    assert said["metrics"]["acc"]["value"] == pytest.approx(sum(right) / 3)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["lm_eval"] == found
    assert (written["mobazoo"], written["lm_eval"]["version"][:2]) == ("eval", "0.")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_synthetic_tasks_ask_what_recall_asks(
    model: Path, hay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies under each setting are those of ``eval recall``, whatever the checkpoint says of generation."""
    penal = tmp_path / "penal"
    shutil.copytree(model, penal)
    GenerationConfig(repetition_penalty=5.0).save_pretrained(penal)
    settings: dict[str, Any] = {"full": FULL, "moba": []}
    replies: dict[Any, list[str]] = {harness: [], recall: []}
    for module in replies:

        def spy(reply: str, answers: Any, module: Any = module) -> float:
            replies[module].append(reply)
            return 1.0 if len(answers) == 1 else 0.25

        monkeypatch.setattr(module, "score", spy)
    found = evaluate(recipe(penal, hay, LmEvalTask(synthetic=SYNTHETIC), settings=settings), quiet)["lm_eval"]
    for said in found["settings"].values():
        assert list(said) == ["mobazoo_needle_200", "mobazoo_tracking_200"]
        assert [one["samples"] for one in said.values()] == [2, 2]
        assert [one["metrics"]["found"]["value"] for one in said.values()] == [1.0, 0.25]
    evaluate(recipe(penal, hay, None, recall=SYNTHETIC, settings=settings), quiet)
    assert replies[harness] == replies[recall]
    assert len(replies[recall]) == 8
    assert min(map(len, replies[recall])) > 0


def test_an_interrupted_measurement_goes_on(
    model: Path, hay: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(model, hay, LmEvalTask(["endings"], str(own), limit=1), dest=str(tmp_path / "out.json"))
    asked = replace(asked, settings={"a": [], "b": FULL})
    done: list[str] = []
    real = harness._evaluated
    monkeypatch.setattr(harness, "_evaluated", lambda *said: (done.append(said[2]), real(*said))[1])

    def stop(what: str, *_: int) -> None:
        if what == "lm-eval, a":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(asked, stop)
    found = evaluate(asked, quiet)["lm_eval"]["settings"]
    assert done == ["endings", "endings"]
    assert [found[name]["endings"]["samples"] for name in "ab"] == [1, 1]


def test_the_command_prints_a_table(model: Path, hay: Path, own: Path) -> None:
    said = ("lm_eval.synthetic=null", "lm_eval.tasks=[endings]", f"lm_eval.include={own}")
    result = CliRunner().invoke(app, ["eval", "lm-eval", f"model={model}", f"data.path={hay}", *said])
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows[0] == ["task", "metric", "samples", "full", "moba"]
    assert rows[1][:3] == ["endings", "acc", "3"]
    assert " ± " in rows[1][3]
    assert rows[2] == ["1 tasks of lm-eval"]
    dry = CliRunner().invoke(app, ["eval", "lm-eval", "model=m", "data.path=t", "--dry-run"]).stdout
    assert "# would do needle, passkey, multikey, tracking with lm-eval\n" in dry


def test_metrics_keep_their_filters_and_errors() -> None:
    said = {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 1, "f1_stderr,strict": "N/A"}
    assert harness._metrics(said) == {
        "acc": {"value": 0.5, "error": 0.1},
        "f1, strict": {"value": 1.0, "error": None},
    }


def test_without_lm_eval_the_extra_is_named(model: Path, hay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "lm_eval" else True)
    result = CliRunner().invoke(app, ["eval", "lm-eval", f"model={model}", f"data.path={hay}"])
    assert result.exit_code == 2
    assert result.stderr == "error: eval.lm_eval: needs lm_eval, which is not here; pip install 'mobazoo[lm-eval]'\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "eval.lm_eval.tasks: want at least one, or eval.lm_eval.synthetic, got none"),
        ({"include": "no/where"}, "eval.lm_eval.include: want a folder of task files, there is none at no/where"),
        ({"limit": 0}, "eval.lm_eval.limit: want a number >= 1, got 0"),
        (
            {"synthetic": replace(SYNTHETIC, tasks=["x"])},
            "eval.lm_eval.synthetic.tasks: unknown task 'x'; known: needle",
        ),
        (
            {"synthetic": replace(SYNTHETIC, lengths=[295])},
            "eval.lm_eval.synthetic.lengths: 295 tokens and a reply need",
        ),
        (
            {"synthetic": replace(SYNTHETIC, lengths=[700])},
            "eval.lm_eval.synthetic.lengths: want texts of 700 tokens in",
        ),
        (
            {"synthetic": replace(SYNTHETIC, lengths=[40])},
            "eval.lm_eval.synthetic.lengths: 40 tokens leave no text around",
        ),
        ({"tasks": ["torn"]}, "eval.lm_eval.tasks: torn does not load: FileNotFoundError: "),
    ],
)
def test_errors(changes: dict[str, Any], message: str, model: Path, hay: Path, own: Path) -> None:
    asked = recipe(model, hay, replace(LmEvalTask(["endings"], str(own)), **changes))
    assert refusal(evaluate, asked).startswith(message)


def test_an_unknown_task_names_the_nearest(
    hay: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's own thousands of task files are read last, and stand in for here by two."""
    real = harness.import_module("lm_eval.tasks").TaskManager

    class Few(real):  # type: ignore[misc, valid-type]
        def __init__(self, include_path: Any, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path, include_defaults=False)
            self._all_tasks += ["arc_easy", "piqa"] if include_defaults else []

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Few)
    for name, hint in (("arc_esy", "did you mean 'arc_easy'?"), ("zzz", "`lm_eval ls tasks` lists lm-eval's")):
        said = refusal(evaluate, recipe(tmp_path / "no model", hay, LmEvalTask([name], str(own))))  # said first
        assert said == f"eval.lm_eval.tasks: unknown task {name!r} in lm-eval or {own}; {hint}"
