"""Evaluation: the losses are transformers' own, settings are what they say, choices are those that attention used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM

import mobazoo
from mobazoo.attention import MoBA, Routes, attend
from mobazoo.config.data import Data
from mobazoo.config.eval import ChoicesTask, EvalRecipe, LossTask
from mobazoo.eval.choices import block_choices
from mobazoo.eval.evaluate import evaluate
from mobazoo.eval.settings import setting
from mobazoo.eval.texts import read_texts
from tests.small import FULL, refusal

LENGTH = 64


def quiet(*_: Any) -> None: ...


def recipe(model: Path, texts: Path, **changes: Any) -> EvalRecipe:
    base = EvalRecipe(str(model), Data(str(texts)), length=LENGTH, loss=LossTask(4, 16))
    return replace(base, **changes)


def test_texts_are_the_beginnings_of_documents_that_are_long_enough(plain: Path, texts: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain)
    found = read_texts(Data(str(texts)), tokenizer, LENGTH, 3)
    assert found.names == ("1.txt", "2.txt", "3.txt")
    assert [tokenizer.decode(row) for row in found.ids] == [(texts / n).read_text()[:LENGTH] for n in found.names]


def test_losses_are_those_of_transformers(plain: Path, texts: Path) -> None:
    found = evaluate(recipe(plain, texts, batch=3), quiet)
    assert found["texts"] == {"count": 4, "length": LENGTH}
    said = found["loss"]["settings"]["as it is"]
    ids = read_texts(Data(str(texts)), AutoTokenizer.from_pretrained(plain), LENGTH, 64).ids
    model = LlamaForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(4, -1)
    assert said["mean"]["mean"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert said["mean"]["error"] == pytest.approx(losses.mean(1).std().item() / 2, rel=1e-4)
    assert said["trailing"]["mean"] == pytest.approx(losses[:, -16:].mean().item(), rel=1e-5)
    first = said["by_position"][0]
    assert (first["first"], first["last"]) == (1, 15)
    assert first["loss"]["mean"] == pytest.approx(losses[:, :15].mean().item(), rel=1e-5)


def test_settings_of_the_same_weights_are_compared(zoo: Path, texts: Path) -> None:
    settings: dict[str, Any] = {"full": FULL, "own": [], "whole": [{"top_k": 8}], "one": [{"top_k": 1}]}
    found = evaluate(recipe(zoo, texts, settings=settings), quiet)["loss"]["settings"]
    assert list(found) == list(settings)
    full, own, whole, one = found.values()
    assert full["difference"] == {"mean": 0.0, "error": 0.0}
    assert own["difference"]["mean"] == pytest.approx(own["mean"]["mean"] - full["mean"]["mean"], abs=1e-6)
    assert abs(own["difference"]["mean"]) > 1e-4
    assert abs(one["difference"]["mean"]) > 1e-4
    assert one["mean"] != own["mean"]
    # Eight blocks of eight are the whole text, and the first two blocks are read whole in any case.
    assert whole["mean"]["mean"] == pytest.approx(full["mean"]["mean"], abs=1e-5)
    assert own["by_position"][0]["loss"]["mean"] == pytest.approx(full["by_position"][0]["loss"]["mean"], abs=1e-5)
    assert (full["share_read"], whole["share_read"]) == (1, 1)
    assert one["share_read"] < own["share_read"] < 1


def test_batches_change_nothing(zoo: Path, texts: Path) -> None:
    one, all_at_once = (
        evaluate(recipe(zoo, texts, batch=batch), quiet)["loss"]["settings"]["as it is"] for batch in (1, 4)
    )
    assert one["mean"]["mean"] == pytest.approx(all_at_once["mean"]["mean"], rel=1e-5)


def test_progress_names_settings(zoo: Path, texts: Path) -> None:
    told: list[tuple[str, int, int]] = []
    evaluate(recipe(zoo, texts, batch=3), lambda *said: told.append(said))
    assert told[-2:] == [("loss, as it is", 3, 4), ("loss, as it is", 4, 4)]


def test_a_setting_is_put_back(zoo: Path) -> None:
    model = mobazoo.load(zoo)

    def fail() -> None:
        with setting(model, [{"top_k": 5}]):
            assert model.model.layers[0].self_attn.layer.pattern == MoBA(8, 5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.model.layers[0].self_attn.layer.pattern == MoBA(8, 2)


def test_choices_are_the_blocks_that_attention_read(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention given these choices is attention as the layer computes it."""
    model = mobazoo.load(zoo)
    ids = torch.randint(257, (LENGTH,), generator=torch.Generator().manual_seed(0))
    task = ChoicesTask("own", layers=[-1], heads=[])
    found = block_choices(model, ids, [], task)
    (layer,) = found["layers"]
    assert (layer["layer"], layer["block_size"], list(layer["heads"])) == (1, 8, ["0", "1", "2", "3"])
    index = torch.full((1, 4, LENGTH, 1), -1, dtype=torch.int32)
    for head, queries in layer["heads"].items():
        assert [len(chosen) for chosen in queries] == [0] * 8 + [1] * 56
        index[0, int(head), 8:, 0] = torch.tensor(queries[8:])[:, 0]
    routes = Routes(index, torch.arange(0, LENGTH, 8, dtype=torch.int32)[None], 8)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def spy(q: Any, k: Any, v: Any, **said: Any) -> Any:
        out = attend(q, k, v, **said)
        seen.append((out, attend(q, k, v, **{**said, "routes": routes})))
        return out

    monkeypatch.setattr("mobazoo.nn.attention.attend", spy)
    with torch.no_grad():
        model(ids[None], use_cache=False)
    torch.testing.assert_close(*seen[1])
    assert not torch.allclose(*seen[0], atol=1e-3)  # another layer chooses otherwise


def test_the_result_is_written_with_the_choices(zoo: Path, texts: Path, tmp_path: Path) -> None:
    task = ChoicesTask("as it is", layers=[0], heads=[1], text=2)
    dest = tmp_path / "out.json"
    evaluate(recipe(zoo, texts, loss=None, choices=task, dest=str(dest)), quiet)
    said = json.loads(dest.read_text())
    assert said["mobazoo"] == "eval"
    assert "loss" not in said
    assert (said["choices"]["text"], said["choices"]["setting"]) == ("3.txt", "as it is")
    assert len(said["choices"]["layers"][0]["heads"]["1"]) == LENGTH


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1}, "eval.length: want a number >= 2, got 1"),
        ({"documents": 0}, "eval.documents: want a number >= 1, got 0"),
        ({"loss": LossTask(buckets=64)}, "eval.loss.buckets: want 1 to 63, the predicted tokens of a text, got 64"),
        ({"loss": LossTask(4, 64)}, "eval.loss.trailing: want 1 to 63, the predicted tokens of a text, got 64"),
        (
            {"loss": None},
            "eval: loss, choices, recall and lm_eval are all null, so there is nothing to do; give one of them",
        ),
        ({"settings": {"a": [{"topk": 3}]}}, "eval.settings.a[0]: unknown key 'topk'; did you mean 'top_k'?"),
        ({"choices": ChoicesTask("b")}, "eval.choices.setting: want one of as it is, got 'b'"),
        ({"choices": ChoicesTask("as it is", text=4)}, "eval.choices.text: want 0 to 3, got 4"),
        ({"choices": ChoicesTask("as it is", layers=[2])}, "eval.choices.layers: 2 is not there; the model has 2"),
        ({"choices": ChoicesTask("as it is", heads=[-5])}, "eval.choices.heads: -5 is not there; the model has 4"),
        (
            {"settings": {"a": FULL}, "choices": ChoicesTask("a")},
            "eval.choices.layers: layer 0 has full attention in this setting; name another",
        ),
        ({"length": 102}, "eval.length: want a document of 102 tokens, the longest of data.path="),
    ],
)
def test_errors(changes: dict[str, Any], message: str, zoo: Path, texts: Path) -> None:
    assert refusal(evaluate, recipe(zoo, texts, **changes)).startswith(message)


def test_a_device_that_is_not_here_is_refused(zoo: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refusal(evaluate, recipe(zoo, texts, device="cuda"))
    assert said == "device: want auto or cpu, there is no GPU here, got 'cuda'"
    assert refusal(evaluate, recipe(zoo, texts, device="toaster")) == "device: want auto, cpu or cuda, got 'toaster'"


def test_a_text_beyond_the_positions_is_refused(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("a" * 200)
    said = refusal(evaluate, recipe(zoo, tmp_path, length=150))
    assert said == f"eval.length: want at most 128, the positions of {zoo}, got 150"
