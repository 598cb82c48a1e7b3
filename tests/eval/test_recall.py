"""Recall: replies and losses are those of transformers, cells are kept when a measurement is interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import mobazoo
from mobazoo.cli import app
from mobazoo.config.data import Data
from mobazoo.config.eval import EvalRecipe, RecallTask
from mobazoo.eval import recall
from mobazoo.eval.evaluate import evaluate
from mobazoo.eval.haystack import Haystack, pose
from tests.small import FULL, plain_checkpoint, refusal, zoo_checkpoint

TASK = RecallTask(["needle", "passkey"], [200, 240], [0.0, 1.0], samples=2)


def quiet(*_: Any) -> None: ...


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_checkpoint(tmp_path_factory.mktemp("long"), positions=300)


@pytest.fixture(scope="module")
def hay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hay")
    (folder / "a.txt").write_text("the quick brown fox " * 30)
    return folder


def recipe(model: Path, hay: Path, **changes: Any) -> EvalRecipe:
    return replace(EvalRecipe(str(model), Data(str(hay)), loss=None, recall=TASK), **changes)


def test_replies_and_losses_are_those_of_transformers(long: Path, hay: Path) -> None:
    tokenizer, theirs = AutoTokenizer.from_pretrained(long), LlamaForCausalLM.from_pretrained(long)
    stack = Haystack.read(Data(str(hay)), tokenizer, 240)
    questions = [pose("tracking", stack, 240, 0.5, RecallTask(hops=i), Random(i), 0) for i in (0, 1)]
    assert len(questions[0].reply) < len(questions[1].reply)
    model = mobazoo.load(long)
    replies, losses = recall._replies(model, tokenizer, questions), recall._losses(model, questions)
    for question, reply, loss in zip(questions, replies, losses, strict=True):
        ids = torch.tensor([question.prompt + question.reply])
        with torch.no_grad():
            logits = theirs(ids).logits[0, 239:-1]
        assert loss == pytest.approx(cross_entropy(logits, ids[0, 240:]).item(), rel=1e-4)
        new = max(len(one.reply) for one in questions) + 8
        want = theirs.generate(
            ids[:, :240], attention_mask=torch.ones(1, 240), max_new_tokens=new, do_sample=False, pad_token_id=256
        )
        assert reply == tokenizer.decode(want[0, 240:], skip_special_tokens=True)


def test_a_reply_is_greedy_whatever_the_checkpoint_says_of_generation(long: Path, hay: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(long), mobazoo.load(long)
    stack = Haystack.read(Data(str(hay)), tokenizer, 240)
    questions = [pose("needle", stack, 240, 0.5, TASK, Random(0), 0)]
    want = recall._replies(model, tokenizer, questions)
    said = {"repetition_penalty": 9.0, "num_beams": 3, "return_dict_in_generate": True, "do_sample": True}
    for name, value in said.items():
        setattr(model.generation_config, name, value)
    assert recall._replies(model, tokenizer, questions) == want
    assert model.generation_config.repetition_penalty == 9.0


def test_settings_get_the_same_prompts(long: Path, hay: Path, tmp_path: Path) -> None:
    zoo = zoo_checkpoint(long, tmp_path / "zoo")
    settings: dict[str, Any] = {"full": FULL, "moba": [], "whole": [{"top_k": 40}]}
    found = evaluate(recipe(zoo, hay, settings=settings), quiet)
    assert "texts" not in found
    full, moba, whole = found["recall"]["settings"].values()
    assert [(cell["task"], cell["length"], cell["depth"]) for cell in full] == [
        (task, length, depth) for task in TASK.tasks for length in TASK.lengths for depth in TASK.depths
    ]
    for one, other in zip(full, whole, strict=True):
        assert one["loss"]["mean"] == pytest.approx(other["loss"]["mean"], rel=1e-4)
    assert all(abs(a["loss"]["mean"] - b["loss"]["mean"]) > 1e-5 for a, b in zip(full, moba, strict=True))


def test_a_right_reply_is_found(long: Path, hay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(long)

    def knows_needles(_: Any, __: Any, questions: Any) -> list[str]:
        return [tokenizer.decode(one.reply) if len(one.answers[0]) == 7 else "?" for one in questions]

    monkeypatch.setattr(recall, "_replies", knows_needles)
    cells = evaluate(recipe(long, hay), quiet)["recall"]["settings"]["as it is"]
    assert [cell["score"]["mean"] for cell in cells] == [1.0] * 4 + [0.0] * 4


def test_an_interrupted_measurement_goes_on(
    long: Path, hay: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dest, measured = tmp_path / "out.json", []
    cell = recall._cell
    monkeypatch.setattr(recall, "_cell", lambda *said: (measured.append(1), cell(*said))[1])
    said = recipe(long, hay, dest=str(dest))

    def stop(what: str, done: int, _: int) -> None:
        if what.startswith("recall") and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(said, stop)
    assert (len(measured), dest.exists()) == (3, False)
    assert [path.name for path in tmp_path.iterdir()] == [".out.json.parts"]
    with monkeypatch.context() as unread:
        unread.setattr("mobazoo.eval.evaluate.ready_model", None)  # said before the model is read
        assert "keeps what an interrupted run of something else" in refusal(evaluate, replace(said, batch=3))
    evaluate(said, quiet)
    assert len(measured) == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    whole = evaluate(replace(said, dest=None), quiet)
    assert json.loads(dest.read_text())["recall"] == whole["recall"]


def test_the_command_prints_a_table(long: Path, hay: Path) -> None:
    said = ("settings={a: [], b: []}", "recall={tasks: [needle], lengths: [200], depths: [0.5], samples: 1}")
    result = CliRunner().invoke(app, ["eval", "recall", f"model={long}", f"data.path={hay}", *said])
    assert result.exit_code == 0, result.output
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows[0] == ["task", "tokens", "a: found", "a: loss", "b: found", "b: loss"]
    assert rows[1][:3] == ["needle", "200", "0 %"]
    assert rows[2] == ["found a 0 %, b 0 %"]


def test_dry_run() -> None:
    said = CliRunner().invoke(app, ["eval", "recall", "model=m", "data.path=t", "--dry-run"]).stdout
    assert "# would hide needle, passkey, multikey, tracking in texts from t, 40 prompts a task\n# would load m" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["nedle"]}, "eval.recall.tasks: unknown task 'nedle'; did you mean 'needle'?"),
        ({"tasks": []}, "eval.recall.tasks: want at least one, got none"),
        ({"lengths": [0]}, "eval.recall.lengths: want numbers of tokens >= 1, got [0]"),
        ({"depths": [1.5]}, "eval.recall.depths: want shares from 0 to 1, got [1.5]"),
        ({"samples": 0}, "eval.recall.samples: want a number >= 1, got 0"),
        ({"keys": 31}, "eval.recall.keys: want a number from 1 to 30, got 31"),
        ({"lengths": [295]}, "eval.recall.lengths: 295 tokens and a reply need 311 positions, the model has 300"),
        ({"lengths": [700]}, "eval.recall.lengths: want texts of 700 tokens in all, data.path="),
    ],
)
def test_errors(changes: dict[str, Any], message: str, long: Path, hay: Path) -> None:
    assert refusal(evaluate, recipe(long, hay, recall=replace(TASK, **changes))).startswith(message)
