"""Two processes over gloo: the same losses as one, resume bit for bit, a checkpoint that loads."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.tensor import DTensor

import mobazoo
from mobazoo.config.data import Data
from mobazoo.config.models import model_entry
from mobazoo.config.train import Lora, Stage, TrainRecipe
from mobazoo.errors import InputError, Stopped, UnsupportedError
from mobazoo.train import engine, run, train
from mobazoo.train.lora import merged
from mobazoo.train.parallel import share_rows
from mobazoo.train.state import whole_weights
from mobazoo.zoo import build

from .conftest import HELD_OUT, metrics
from .test_resume import same, stop_after

Make = Callable[..., TrainRecipe]
WORLD = 2
STAGES = [Stage([{"pattern": "moba", "block_size": 8, "top_k": 2}], 0.5), Stage([{"pattern": "full"}])]


def together(work: Callable[[], object]) -> None:
    """Runs it in two processes that know each other, forked from this one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
                # One thread: a team of OpenMP threads does not survive a fork, and using it again hangs.
                os.environ |= {"OMP_NUM_THREADS": "1"}
                torch.set_num_threads(1)
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TOKENIZERS_PARALLELISM": "false"}
                AcceleratorState._reset_state(True)
                PartialState._reset_state()
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * WORLD


def losses(dest: Path) -> torch.Tensor:
    return torch.tensor([line.get("loss", line.get("validation", {}).get("loss")) for line in metrics(dest)])


@pytest.mark.parametrize("shard", [True, False])
def test_two_processes_are_as_one(shard: bool, recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"schedule": STAGES, "validation": HELD_OUT}
    if not shard:  # copies learn from a stream
        (tmp_path / "set").mkdir()
        texts = "".join(json.dumps({"text": f"number {i} " * 20}) + "\n" for i in range(90))
        (tmp_path / "set" / "train.jsonl").write_text(texts)
        fields["data"] = Data(str(tmp_path / "set"), format="hub", streaming=True)
    one = recipe(**fields, dest=str(tmp_path / "one"))
    train(one)

    def work() -> None:
        def looking(model: torch.nn.Module) -> Any:
            assert any(isinstance(parameter, DTensor) for parameter in model.parameters()) == shard
            return whole_weights(model)

        monkeypatch.setattr(run, "whole_weights", looking)
        train(recipe(**fields, shard=shard, dest=str(tmp_path / "two")))
        three = recipe(**fields, shard=shard, dest=str(tmp_path / "three"))
        with monkeypatch.context() as patch:
            stop_after(3, patch, rank=1)  # a wish of one process is one of all
            with pytest.raises(Stopped):
                train(three)
        if distributed.get_rank() == 0:
            shutil.copytree(tmp_path / "three.training", tmp_path / "four.training")
        train(three)

    together(work)
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=2e-4, rtol=2e-4)
    assert same(tmp_path / "three", tmp_path / "two")
    assert [path.name for path in (tmp_path / "four.training").glob("step-*")] == ["step-00000003"]
    said: list[str] = []
    train(recipe(**fields, dest=str(tmp_path / "four")), log=said.append)
    assert any(
        "of 2 processes, here are 1: it goes on with the same rows, but not bit for bit" in line for line in said
    )
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "four"), atol=2e-4, rtol=2e-4)
    ids = torch.arange(3, 60)[None]
    want, *others = (mobazoo.load(tmp_path / name, check_sums=True)(ids).logits for name in ("one", "two", "four"))
    assert all((other - want).abs().max() < 1e-2 for other in others)


def test_sharded_adapters_are_as_whole_ones(
    recipe: Make, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"model": str(plain_run), "config": {}, "validation": HELD_OUT, "micro_batch": 1}
    fields |= {"lora": Lora(4, 8.0, 0.0, ["q_proj", "up_proj"])}
    train(recipe(**fields, dest=str(tmp_path / "one")))

    def work() -> None:
        def looking(model: Any) -> Any:
            adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
            assert len(adapters) == 8
            assert all(isinstance(parameter, DTensor) for parameter in adapters)
            return merged(model)

        with monkeypatch.context() as patch:
            patch.setattr(run, "merged", looking)
            train(recipe(**fields, dest=str(tmp_path / "two")))
        three = recipe(**fields, dest=str(tmp_path / "three"))
        with monkeypatch.context() as patch:
            stop_after(3, patch)
            with pytest.raises(Stopped):
                train(three)
        train(three)

    together(work)
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=2e-4, rtol=2e-4)
    assert same(tmp_path / "three", tmp_path / "two")
    before, one, two = (
        load_file(path / "model.safetensors") for path in (plain_run, tmp_path / "one", tmp_path / "two")
    )
    for name, tensor in one.items():
        learned = "q_proj" in name or "up_proj" in name
        assert [torch.equal(before[name], other) for other in (tensor, two[name])] == [not learned] * 2
    ids = torch.arange(3, 60)[None]
    models = [mobazoo.load(tmp_path / name, check_sums=True) for name in ("one", "two")]
    assert (models[0](ids).logits - models[1](ids).logits).abs().max() < 1e-2


def test_processes_that_share_rows_are_as_one(recipe: Make, tmp_path: Path) -> None:
    kconv = [{"layers": ":", "pattern": "moba", "block_size": 8, "top_k": 3, "kconv": 3}]
    fields: dict[str, Any] = {"attention": kconv, "validation": HELD_OUT, "micro_batch": 2}
    train(recipe(**fields, dest=str(tmp_path / "one")))

    def work() -> None:
        for shard in (True, False):
            train(recipe(**fields, shard=shard, sequence=2, dest=str(tmp_path / f"{shard}")))

    together(work)
    ids = torch.arange(3, 60)[None]
    want = mobazoo.load(tmp_path / "one")(ids, use_cache=False).logits
    for name in ("True", "False"):
        torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / name), atol=2e-4, rtol=2e-4)
        assert (mobazoo.load(tmp_path / name)(ids, use_cache=False).logits - want).abs().max() < 1e-2


def test_shared_rows_give_the_same_states_and_gradients(tmp_path: Path) -> None:
    model = build(model_entry("llama-tiny", ["config.hidden_size=32", "config.vocab_size=97"]), "cpu").double()
    model.set_attention([{"pattern": "moba", "block_size": 4, "top_k": 3}])
    ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "position_ids": torch.tensor([*range(15), *range(9)]).expand(2, 24), "labels": ids}
    whole = model(**batch, loss_only=True)
    whole.loss.backward()
    states = model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
    want = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()

    def work() -> None:
        distributed.init_process_group("gloo")
        share_rows(model, WORLD)
        sequence = model.model.sequence
        assert sequence is not None
        loss = model(**batch, loss_only=True).loss
        loss.backward()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        torch.testing.assert_close(mean / WORLD, whole.loss.detach())
        part = sequence.part(24)
        got = model.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).last_hidden_state
        torch.testing.assert_close(got, states[:, part], atol=1e-12, rtol=1e-12)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            distributed.all_reduce(parameter.grad)
            torch.testing.assert_close(parameter.grad / WORLD, want[name], atol=1e-12, rtol=1e-10)
        with pytest.raises(InputError, match="sequence: rows of 23 tokens do not divide over 2 processes"):
            model(ids[:, :23])
        with pytest.raises(UnsupportedError, match="rows that several processes share: pass loss_only=True"):
            model(ids, labels=ids)
        with pytest.raises(UnsupportedError, match="a cache of rows that several processes share"):
            model(ids, use_cache=True)
        distributed.destroy_process_group()

    together(work)


@pytest.mark.slow
def test_a_compiled_sharded_run_switches_and_goes_on(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "TrainingArguments", partial(engine.TrainingArguments, torch_compile_backend="eager"))
    train(recipe(schedule=STAGES, dest=str(tmp_path / "one")))

    def work() -> None:
        train(recipe(schedule=STAGES, compile=True, dest=str(tmp_path / "two")))
        three = recipe(schedule=STAGES, compile=True, dest=str(tmp_path / "three"))
        with monkeypatch.context() as patch:
            stop_after(1, patch)
            with pytest.raises(Stopped):
                train(three)
        train(three)

    together(work)
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=2e-4, rtol=2e-4)
    assert same(tmp_path / "three", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"shard": False}, {"dtype": "bfloat16"}, {"mixed": True}, {"sequence": 2}], ids=str)
def test_adapters_in_other_ways(how: dict[str, Any], recipe: Make, plain_run: Path, tmp_path: Path) -> None:
    fields = {"model": str(plain_run), "config": {}, "lora": Lora(4, 8.0), **how}
    train(recipe(**{**fields, "sequence": 1}, dest=str(tmp_path / "one")))
    together(lambda: train(recipe(**fields, dest=str(tmp_path / "two"))))
    # bfloat16 keeps eight bits of the losses, which are below 8.
    most = 2e-4 if how.keys() & {"shard", "sequence"} else 8 * 2**-8
    assert (losses(tmp_path / "one") - losses(tmp_path / "two")).abs().max() < most
    mobazoo.load(tmp_path / "two", check_sums=True)


def test_sequence_is_checked(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train.sequence: 1 processes are no multiple of 2; launch with torchrun"):
        engine.arguments(recipe(sequence=2), tmp_path)
    with pytest.raises(InputError, match=r"train.length: 64 is no multiple of sequence, 3"):
        recipe(sequence=3).check()
    with pytest.raises(InputError, match=r"train.compile: does not go with sequence"):
        recipe(sequence=2, compile=True).check()


def test_sharding_never_turns_into_copies(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "is_launched", lambda: True)
    monkeypatch.setattr(engine.Trainer, "__init__", lambda self, **given: None)
    with pytest.raises(UnsupportedError, match=r"train.shard: this transformers would copy the model"):
        engine.Runner(tmp_path, lambda folder, weights: None, recipe())
