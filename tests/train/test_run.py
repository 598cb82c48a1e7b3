"""A run from recipe to checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mobazoo
from mobazoo import extras
from mobazoo.checkpoint.manifest import check_manifest
from mobazoo.config.data import Data
from mobazoo.config.train import Lora, TrainRecipe
from mobazoo.data.rows import Rows
from mobazoo.data.tokens import Tokens
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.train import engine, plan_train, run, train
from mobazoo.train.evaluate import evaluate, summary
from mobazoo.train.order import Order

from .conftest import HELD_OUT, metrics

Make = Callable[..., TrainRecipe]


def test_a_run_learns_and_leaves_a_checkpoint(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "peak", lambda device: 1e9)
    made = recipe(steps=12, validation=HELD_OUT, evaluate_every=6, micro_batch=2)
    seen: list[str] = []
    said_aloud: list[str] = []
    report = train(made, lambda what, done, total: seen.append(what), said_aloud.append)
    assert report.steps == 12
    assert report.tokens == 12 * 4 * 64
    said = metrics(tmp_path / "out")
    losses = [line["loss"] for line in said if "loss" in line]
    assert len(losses) == 12
    assert abs(losses[0] - log(300)) < 0.5  # random weights know nothing
    assert losses[-1] < losses[0] - 0.3
    assert [line["step"] for line in said if "validation" in line] == [6, 12]
    last = next(line["validation"] for line in reversed(said) if "validation" in line)
    assert report.validation is not None
    assert asdict(report.validation) == last
    assert last["by_position"].keys() == {"0-63"}
    assert 0.3 < said[0]["keys_read"] < 1
    weights = plan_train(replace(made, dest=f"{made.dest}-other")).parameters
    for line in said:
        if "loss" in line:  # each weight but the embedding and at most every key, of a peak of 1e9
            share = line["tokens_per_second"] / 1e9
            assert 6 * (weights - 300 * 32) * share < line["mfu"] < 6 * (weights + 2 * 2 * 4 * 8 * 64) * share
    first = said[0]
    console = f"step 1 of 12: loss {first['loss']:.4f}, {first['tokens_per_second']:,.0f} tokens/s, "
    console += f"{first['mfu']:.1%} of the device's peak, {first['keys_read']:.1%} of the keys read, learning rate"
    assert any(line.startswith(console) for line in said_aloud)
    console = f"step 12: validation loss {last['loss']:.4f}, trailing {last['trailing']:.4f}; by position 0-63 "
    assert f"{console}{last['by_position']['0-63']:.4f}" in said_aloud
    assert set(seen) == {"tokenize", "train", "evaluate"}
    check_manifest(tmp_path / "out")
    model = mobazoo.load(tmp_path / "out", check_sums=True)
    assert model.config.use_cache
    assert {layer.pattern.block_size for layer in model.config.attention_layers()} == {8}  # the zoo file says 64
    assert model.config.moba["provenance"]["trained_from"] == "random weights"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 1


def test_training_continues_from_a_checkpoint_and_ends_as_plain_hf(
    recipe: Make, plain_run: Path, tmp_path: Path
) -> None:
    fields = {"model": str(plain_run), "config": {}, "tokenizer": None, "dest": str(tmp_path / "hf"), "to": "hf"}
    with pytest.raises(InputError, match=r"train\.to: a plain Hugging Face checkpoint has full attention"):
        train(recipe(**fields))
    train(recipe(**fields, attention=[{"layers": ":", "pattern": "full"}]))
    assert metrics(tmp_path / "hf")[0]["loss"] < metrics(plain_run)[0]["loss"] - 0.1
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(stock).__name__ == "LlamaForCausalLM"
    ids = torch.arange(3, 60)[None]
    torch.testing.assert_close(stock(ids).logits, mobazoo.load(tmp_path / "hf")(ids).logits, atol=1e-5, rtol=1e-5)


def test_the_batch_does_not_depend_on_how_it_is_cut(recipe: Make, plain_run: Path, tmp_path: Path) -> None:
    train(recipe(micro_batch=1))
    found = [[line["loss"] for line in metrics(folder)] for folder in (plain_run, tmp_path / "out")]
    torch.testing.assert_close(*map(torch.tensor, found), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"mixed": True}, {"gradient_checkpointing": True}])
def test_other_ways_to_compute_learn_the_same(
    fields: dict[str, Any], recipe: Make, plain_run: Path, tmp_path: Path
) -> None:
    train(recipe(**fields))
    plain, other = ([line["loss"] for line in metrics(folder)] for folder in (plain_run, tmp_path / "out"))
    if "gradient_checkpointing" in fields:
        assert other == plain
    else:
        assert other != plain
        assert all(abs(a - b) < 0.05 for a, b in zip(plain, other, strict=True))


def test_nan_stops_the_run(recipe: Make, plain_run: Path, tmp_path: Path) -> None:
    model = mobazoo.load(plain_run)
    with torch.no_grad():
        model.lm_head.weight[5, 3] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    with pytest.raises(InputError, match="not finite at step 1, and nothing of that step was kept; there is no"):
        train(recipe(model=str(tmp_path / "bad"), config={}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"steps": None}, "train: give either steps or tokens"),
        ({"tokens": 5}, "train: give either steps or tokens"),
        ({"steps": 0}, "train.steps: want an integer >= 1, got 0"),
        ({"length": 1}, "train.length: want an integer >= 2, got 1"),
        ({"log_every": 0}, "train.log_every: want an integer >= 1, got 0"),
        ({"decay": "step"}, "train.decay: want one of cosine, linear, constant, got 'step'"),
        ({"learning_rate": 0.0}, "train.learning_rate: want a number > 0, got 0"),
        ({"clip": 0.0}, "train.clip: want a number > 0, got 0"),
        ({"warmup": 1.0}, "train.warmup: want a share from 0 up to 1, got 1.0"),
        ({"micro_batch": 3}, "train.micro_batch: a batch of 4 rows is no multiple of 3"),
        ({"mixed": True, "dtype": "bfloat16"}, "train.mixed: works over float32 weights, and dtype is bfloat16"),
        ({"evaluate_every": 2}, "train.evaluate_every: there is no validation to measure on"),
        ({"length": 8192}, "train.length: 8192, but the model has 4096 positions"),
        ({"tokenizer": None}, "train.tokenizer: llama-tiny starts with random weights and has none"),
        ({"config": {"vocab_size": 290}}, "train.tokenizer: has 300 tokens, the model 290"),
        ({"config": {"hiden_size": 32}}, "train.config: unknown key 'hiden_size'; did you mean 'hidden_size'?"),
        ({"attention": [{"layers": 7, "pattern": "full"}]}, "moba.attention"),
        ({"data": Data("nowhere")}, "data.path: nowhere: no such file or folder"),
        ({"validation": Data("nowhere", format="jsonl")}, "data.path: nowhere: no such file or folder"),
        ({"data": Data("nowhere", format="jsonl", messages="m")}, "train.tokenizer: has no chat template"),
        (
            {"lora": Lora(targets=["lm_head"])},
            "train.lora.targets: no projection is called 'lm_head'; known: down_proj",
        ),
        ({"lora": Lora(rank=0)}, "train.lora: want rank >= 1"),
        ({"model": "nowhere", "config": {}}, "nowhere: no such folder"),
    ],
)
def test_bad_recipes_fail_before_data_is_read(
    fields: dict[str, Any], message: str, recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(data: Data) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr("mobazoo.train.run.read_documents", read)
    for call in (plan_train, train):
        with pytest.raises(InputError, match=message.replace("?", r"\?")):
            call(recipe(**fields))  # type: ignore[operator]


def test_a_checkpoints_config_is_not_the_recipes(recipe: Make, plain_run: Path) -> None:
    with pytest.raises(InputError, match=r"train.config: only a model of the zoo can be changed, and .*out is a check"):
        train(recipe(model=str(plain_run)))
    with pytest.raises(InputError, match="exists; pass overwrite=true"):
        train(recipe(dest=str(plain_run)))


def test_without_accelerate_the_extra_is_named(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'mobazoo\[train\]'"):
        train(recipe())


def test_a_tokenizer_needs_an_end(recipe: Make, tokenizer: str, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(tokenizer, eos_token=None).save_pretrained(tmp_path / "endless")
    with pytest.raises(InputError, match=r"train.tokenizer: has no end token"):
        train(recipe(tokenizer=str(tmp_path / "endless")))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"has no tokenizer"):
        train(recipe(tokenizer=str(tmp_path / "none")))


def test_batches_must_divide(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.TrainingArguments, "world_size", 3)
    with pytest.raises(InputError, match=r"train\.batch: 4 rows do not divide over 3 processes in forwards of 1"):
        engine.arguments(recipe(), tmp_path)
    monkeypatch.setattr(engine.TrainingArguments, "n_gpu", 2)
    with pytest.raises(InputError, match=r"one process sees 2 GPUs; launch one for each \(torchrun --nproc-per-node 2"):
        engine.arguments(recipe(), tmp_path)


def test_every_row_comes_once_before_any_comes_again() -> None:
    n = 70
    tokens = Tokens(torch.arange(n, dtype=torch.int32), torch.ones(n, dtype=torch.bool), (10,) * 7, ("",) * 7)
    order = Order(Rows(tokens, 10), 21, seed=1)
    starts = [int(order[i].ids[0]) // 10 for i in range(21)]
    assert [sorted(starts[i : i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert starts[:7] != starts[7:14]
    again = Order(Rows(tokens, 10), 21, seed=1)
    assert [int(again[i].ids[0]) // 10 for i in reversed(range(21))] == starts[::-1]


def test_logits_of_a_validation_are_made_in_pieces(plain_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mobazoo.load(plain_run)
    tokens = Tokens(torch.arange(3, 103, dtype=torch.int32), torch.ones(100, dtype=torch.bool), (100,), ("",))
    rows = Rows(tokens, 32)
    whole = evaluate(model, rows, 4, torch.device("cpu"))
    monkeypatch.setattr("mobazoo.train.evaluate.PIECE", 4 * 300 * 7)
    seen: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    pieces = evaluate(model, rows, 4, torch.device("cpu"))
    hook.remove()
    assert max(seen) == 7
    assert pieces.tokens == whole.tokens == 96
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-6)
    ids = tokens.ids.long()
    alone = [model(piece[None], labels=piece[None]).loss.item() * (len(piece) - 1) for piece in ids.split(32)]
    assert whole.loss == pytest.approx(sum(alone) / 96, rel=1e-5)


def test_losses_by_position() -> None:
    total, count = torch.zeros(200).double(), torch.zeros(200).double()
    total[[1, 63, 64, 199]] = torch.tensor([1.0, 3.0, 5.0, 8.0]).double()
    count[[1, 63, 64, 199]] = torch.tensor([1.0, 1.0, 1.0, 2.0]).double()
    found = summary(total, count)
    assert found.by_position == {"0-63": 2.0, "64-127": 5.0, "128-199": 4.0}
    assert (found.loss, found.trailing, found.tokens) == (3.4, 4.0, 5)
    assert summary(total[:100], count[:100]).trailing is None
