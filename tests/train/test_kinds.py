"""Streams, adapters, chats, TensorBoard, speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, LlamaConfig

import mobazoo
from mobazoo import extras
from mobazoo.attention.pattern import MoBA
from mobazoo.config.data import Data
from mobazoo.config.rules import LayerAttention
from mobazoo.config.train import Lora, TrainRecipe
from mobazoo.data.source import Document
from mobazoo.data.stream import Stream
from mobazoo.errors import InputError, Stopped, UnsupportedError
from mobazoo.train import speed, train
from mobazoo.train.lora import ADAPTER, read_adapter
from mobazoo.train.metrics import Metrics

from .conftest import HELD_OUT, metrics
from .test_resume import same, stop_after

Make = Callable[..., TrainRecipe]


def documents() -> Iterator[Document]:
    for i in range(30):
        yield Document(f"{i}", f"number {i} " * (i + 1))


def test_a_stream_gives_every_token_once_a_pass_in_an_order_of_its_own(tokenizer: str) -> None:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    stream = Stream(documents, loaded, 32, 10**6, seed=1)
    want = sorted(token for d in documents() for token in [*loaded(d.text)["input_ids"], 1])
    seen: list[int] = []
    at = 0
    while len(seen) < len(want):
        seen += stream[at].ids.tolist()
        at += 1
    assert sorted(seen) == want
    again = Stream(documents, loaded, 32, 10**6, seed=1)
    some = (3, 9, at + 2)
    first = [row.ids.tolist() for row in _take(Stream(documents, loaded, 32, 9, seed=1), at + 3)]
    assert [again[i].ids.tolist() for i in some] == [first[i] for i in some]
    with pytest.raises(InputError, match="data: no document is left"):
        Stream(lambda: iter(()), loaded, 32, 5, seed=1)[0]


def _take(stream: Stream, count: int) -> list[Any]:
    return [stream[i] for i in range(count)]


def test_a_streamed_run_goes_on_bit_for_bit(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    (tmp_path / "set").mkdir()
    rows = "".join(json.dumps({"text": document.text}) + "\n" for document in documents())
    (tmp_path / "set" / "train.jsonl").write_text(rows)
    data = Data(str(tmp_path / "set"), format="hub", streaming=True)
    train(recipe(data=data, steps=6, dest=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            train(recipe(data=data, steps=6))
    train(recipe(data=data, steps=6))
    assert same(tmp_path / "out", tmp_path / "whole")


def test_adapters_learn_resume_and_merge(
    recipe: Make, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"model": str(plain_run), "config": {}, "steps": 6, "lora": Lora(4, 8.0, 0.1, ["q_proj", "up_proj"])}
    train(recipe(**base, dest=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            train(recipe(**base))
    assert not (tmp_path / "out.training" / "step-00000003" / "model.safetensors").exists()
    train(recipe(**base))
    assert same(tmp_path / "out", tmp_path / "whole")
    before, after = (load_file(path / "model.safetensors") for path in (plain_run, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = ("self_attn.q_proj", "mlp.up_proj")
    assert changed == {f"model.layers.{i}.{kind}.weight" for i in range(2) for kind in kinds}
    whole = mobazoo.load(tmp_path / "out")
    save_file({"other": torch.zeros(1)}, tmp_path / ADAPTER)
    with pytest.raises(InputError, match=r"adapter.safetensors: has other adapters than the recipe asks for"):
        read_adapter(tmp_path, whole)
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "peft" else True)
    with pytest.raises(UnsupportedError, match=r"train.lora: needs peft, .*'mobazoo\[lora\]'"):
        train(recipe(lora=Lora()))


def test_prompts_are_not_learned(recipe: Make, tokenizer: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    loaded = AutoTokenizer.from_pretrained(tokenizer, chat_template=template)
    loaded.save_pretrained(tmp_path / "chat")
    for name, answer in (("one", "x"), ("two", "y")):
        chat = [{"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": answer}]
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"m": chat}) + "\n")
    losses = {}
    for name in ("one", "two"):
        data = Data(str(tmp_path / f"{name}.jsonl"), format="jsonl", messages="m")
        report = train(recipe(data=data, tokenizer=str(tmp_path / "chat"), steps=40, overwrite=True, batch=1))
        losses[name] = report.loss
        model = mobazoo.load(tmp_path / "out")
        ids = loaded.apply_chat_template(
            [{"role": "user", "content": "1 + 1 = ?"}], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        assert loaded.decode(model(ids).logits[0, -1].argmax()) == ("x" if name == "one" else "y")
        prompt = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
        assert prompt > 4  # nothing was learned of it
    assert max(losses.values()) < 0.5


def test_tensorboard_gets_every_line(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "tensorboard" else True)
    with pytest.raises(UnsupportedError, match=r"train.tensorboard: needs tensorboard, .*'mobazoo\[tensorboard\]'"):
        train(recipe(tensorboard=True))
    monkeypatch.undo()
    train(recipe(tensorboard=True, validation=HELD_OUT))
    written = EventAccumulator(str(tmp_path / "out.tensorboard"))
    written.Reload()
    lines = metrics(tmp_path / "out")
    steps = [said for said in lines if "loss" in said]
    assert {tag for tag in written.Tags()["scalars"] if tag.startswith("train/")} == {
        f"train/{key}" for key in steps[0]
    }
    for key in ("loss", "keys_read"):
        scalars = [(said.step, said.value) for said in written.Scalars(f"train/{key}")]
        assert scalars == [(said["step"], pytest.approx(said[key])) for said in steps]
    [validation] = [(said["step"], said["validation"]) for said in lines if "validation" in said]
    step, found = validation
    wanted = {"loss": found["loss"], "trailing": found["trailing"], "by_position/0-63": found["by_position"]["0-63"]}
    for key, value in wanted.items():
        [scalar] = written.Scalars(f"validation/{key}")
        assert (scalar.step, scalar.value) == (step, pytest.approx(value))


def test_a_full_disk_is_named_by_the_metrics_too(recipe: Make) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    with pytest.raises(InputError, match="/dev/full: disk full; nothing was changed; free some space"):
        Metrics(recipe(), Path("/dev/full"), lambda: 1.0, lambda rate: None, None, None).write({"step": 1})


def test_speed_is_counted_from_first_principles(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        vocab_size=10, hidden_size=16, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
    )
    layers = [LayerAttention(), LayerAttention(MoBA(4, 1))]
    sizes = {8: 3}
    assert speed.share_of_keys(layers, sizes) == (36 + 20) / 72
    want = 6 * (1000 - 160) + 12 * 16 * (36 + 20) / 8
    assert speed.operations_per_token(config, 1000, layers, sizes) == pytest.approx(want)
    assert speed.peak(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    assert speed.peak(torch.device("cuda")) == 756e12
