"""Which layers to leave full: the arithmetic by hand, and on small models that were trained, against other choices."""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import mobazoo
from mobazoo.attention import MoBA
from mobazoo.cli import app
from mobazoo.config.probe import Suggest
from mobazoo.config.rules import parse_rules, resolve
from mobazoo.config.shipped import RECIPES, shipped
from mobazoo.probe import layers
from mobazoo.probe.layers import FULL, layer_losses, others, rules_for, suggest_rules, trust

LENGTH = 192


def quiet(*_: Any) -> None: ...


@pytest.mark.parametrize("full", [set(), {0}, {4}, {0, 1, 4}, {0, 2, 3}, set(range(5))])
def test_rules_leave_these_layers_full(full: set[int]) -> None:
    found = resolve(parse_rules(rules_for(full, 5, Suggest(64, 3))), 5)
    assert {number for number, layer in enumerate(found) if layer.pattern != MoBA(64, 3)} == full


def test_other_choices_are_distinct_and_not_the_suggestion() -> None:
    assert others([1], 4, 8) == [[0], [2], [3]]
    drawn = others([0, 1], 8, 6)
    assert len({tuple(choice) for choice in drawn} | {(0, 1)}) == 7
    assert others([0, 1], 8, 6) == drawn
    assert others([], 4, 8) == []


@pytest.mark.parametrize(
    ("ours", "drawn", "error", "level"),
    [
        (0.1, [0.2, 0.3, 0.3, 0.2], 0.05, "high"),
        (0.1, [0.2, 0.2, 0.05, 0.05], 0.01, "some"),  # well ahead of the mean, but not of half of them
        (0.1, [0.2, 0.3, 0.3, 0.2], 0.1, "some"),
        (0.1, [0.2, 0.3, 0.3, 0.2], 0.2, "low"),
        (0.3, [0.2, 0.3, 0.3, 0.2], 0.01, "low"),
    ],
)
def test_trust_by_hand(ours: float, drawn: list[float], error: float, level: str) -> None:
    checked = {
        "texts": 8,
        "suggested": {"mean": ours, "error": 0.1},
        "others": [{"mean": mean} for mean in drawn],
        "against_others": {"mean": ours - sum(drawn) / len(drawn), "error": error},
    }
    assert trust(checked)["level"] == level


def test_without_a_choice_there_is_no_trust() -> None:
    assert trust({"others": []})["level"] == "none"


def test_each_layer_is_switched_alone(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Any]] = []
    model = mobazoo.load(zoo)

    def spy(model: Any, ids: torch.Tensor, *_: Any) -> torch.Tensor:
        seen.append([layer.self_attn.layer.pattern for layer in model.model.layers])
        return torch.zeros(len(ids), 3)

    monkeypatch.setattr(layers, "text_losses", spy)
    layer_losses(model, torch.zeros(4, 4), Suggest(8, 3), 2, quiet)
    full = mobazoo.attention.Full()
    assert seen == [[full, full], [MoBA(8, 3), full], [full, MoBA(8, 3)]]
    seen.clear()
    # The worst layer of the even texts stays full; the odd ones are what every choice is checked on.
    suggest_rules(model, torch.zeros(6, 4), Suggest(8, 3, full=1), 2, quiet)
    assert seen[3:] == [[full, MoBA(8, 3)], [MoBA(8, 3), full], [MoBA(8, 3), full]]


def stdlib_rows(number: int, source: random.Random, text: str) -> torch.Tensor:
    """``[number, LENGTH]`` characters from random places."""
    places = [source.randrange(len(text) - LENGTH) for _ in range(number)]
    return torch.tensor([[min(ord(letter), 255) for letter in text[at : at + LENGTH]] for at in places])


def test_suggested_layers_beat_other_choices_of_a_trained_model(plain: Path) -> None:
    """A Llama of 4 layers learns characters for seconds; blocks of 8, top 3, read an eighth of a text."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    text, source = "".join(path.read_text("utf-8", errors="ignore") for path in files), random.Random(0)
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.05, tie_word_embeddings=True))
    optimizer = torch.optim.AdamW(dense.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(120):
        ids = stdlib_rows(8, source, text)
        dense(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = mobazoo.load(plain)
    model = type(model)(type(model.config)(**sizes, **heads, tie_word_embeddings=True, moba={"attention": [FULL]}))
    model.load_state_dict(dense.state_dict())
    found = suggest_rules(model.eval(), stdlib_rows(64, source, text), Suggest(8, 3, full=1), 16, quiet)
    said, ours = found["checked"], found["checked"]["suggested"]["mean"]
    numbers = {tuple(other["full"]): round(other["mean"], 4) for other in said["others"]}
    against = said["against_others"]
    assert against["mean"] < -against["error"], f"full {found['full']}: {ours:.4f}, others {numbers}, {against}"
    assert ours < min(numbers.values()), f"full {found['full']}: {ours:.4f} nats lost, others {numbers}"
    assert found["trust"]["level"] in ("some", "high")


@pytest.mark.slow
def test_suggested_layers_beat_other_choices_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's dense checkpoint, by the first stages of its recipe on fewer tokens; prints what the probe says.

    `python -m pytest -m slow tests/probe` does it in some two minutes on two cores.
    """

    def call(*args: object) -> str:
        result = CliRunner().invoke(app, list(map(str, args)))
        assert result.exit_code == 0, result.output
        return result.stdout

    demo = yaml.safe_load(shipped(RECIPES)["quickstart"].text)
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump({**demo, "stages": demo["stages"][:3]}))
    call("run", tmp_path / "demo.yaml", f"folder={tmp_path / 'demo'}", "stages[1].with.tokens=400000")
    data = ("data.path=stdlib", "data.validation=0.15", "data.split=validation", "data.min_chars=3000", "documents=24")
    printed = call("probe", tmp_path / "demo" / "plain", *data, f"dest={tmp_path / 'probe.json'}")
    with capsys.disabled():
        print(f"\n{printed}")
    found = json.loads((tmp_path / "probe.json").read_text())["probe"]["suggested"]
    checked = found["checked"]
    ours, drawn = checked["suggested"]["mean"], [other["mean"] for other in checked["others"]]
    against = checked["against_others"]
    assert against["mean"] < -2 * against["error"], found
    assert ours < min(drawn), found
    assert found["trust"]["level"] == "high", found
