"""The zoo's model files: every one is read, built on ``meta`` and counted."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from mobazoo.attention import Full, MoBA
from mobazoo.config.models import ModelEntry, model_entry, model_names, parse_entry
from mobazoo.config.shipped import MODELS, Source, shipped
from mobazoo.errors import InputError, MobazooError
from mobazoo.zoo import build, families, make_config
from tests.models.tiny import STOCK, ids

GOOD = """
family: llama
licence: MIT
parameters: 10
config: {hidden_size: 8, rope_parameters: {rope_type: default, rope_theta: 10000.0}}
attention: [{pattern: moba, block_size: 4, top_k: 2}]
"""


def test_the_sizes_people_use_are_there() -> None:
    assert set(model_names()) == {
        *("llama-tiny", "llama3.1-8b", "llama3.2-1b", "llama3.2-3b"),
        *("qwen2-tiny", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"),
        *("qwen3-tiny", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b"),
    }


@pytest.mark.parametrize("name", model_names())
def test_a_model_file_is_the_model_it_names(name: str) -> None:
    """Names, shapes and count against transformers' class, and the count against the published total."""
    entry = model_entry(name)
    mine = build(entry)
    with torch.device("meta"):
        theirs = STOCK[entry.family](STOCK[entry.family].config_class(**entry.config))
    assert mine.num_parameters() == theirs.num_parameters() == entry.parameters
    assert {n: p.shape for n, p in mine.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}
    assert {p.device.type for p in mine.parameters()} == {"meta"}
    assert (entry.source is None) == name.endswith("-tiny")
    assert entry.licence
    assert f"{entry.family}/{name}" in shipped(MODELS)


@pytest.mark.parametrize("name", model_names())
def test_last_layers_are_full_and_moba_leaves_something_out(name: str) -> None:
    config = make_config(model_entry(name))
    *first, _, _, last = config.attention_layers()
    assert last.pattern == Full()
    assert {type(layer.pattern) for layer in first} == {MoBA}
    assert not first[0].pattern.covers(config.max_position_embeddings)
    full = make_config(model_entry(name, ["attention=[]"]))
    assert {layer.pattern for layer in full.attention_layers()} == {Full()}


@pytest.mark.parametrize("family", families())
def test_a_tiny_model_runs(family: str) -> None:
    model = build(model_entry(f"{family}-tiny"), "cpu")
    assert model(ids(1, 200)).logits.shape == (1, 200, 2048)


@pytest.mark.parametrize("family", families())
def test_every_family_has_a_card_that_names_its_models(family: str) -> None:
    card = (files("mobazoo.models") / family / "card.md").read_text()
    for name in model_names():
        entry = model_entry(name)
        if entry.family == family:
            assert f"`{name}`" in card
            assert entry.source is None or entry.source in card


def test_overrides_reach_into_lists() -> None:
    entry = model_entry("llama-tiny", ["attention[0].top_k=7", "config.num_hidden_layers=6", "licence='a=b'"])
    assert entry.attention[0] == {"layers": ":", "pattern": "moba", "block_size": 64, "top_k": 7}
    assert (entry.config["num_hidden_layers"], entry.licence) == (6, "a=b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention[9].top_k=3", "attention has 2 items, counted from 0"),
        ("licence=${oc.env:HOME}", "${...} is refused"),
        ("attentions=[]", "unknown key 'attentions'; did you mean 'attention'?"),
        ("attention[0].topk=3", "attention[0]: unknown key 'topk'; did you mean 'top_k'?"),
        ("parameters=many", "parameters: want an integer, got 'many'"),
        ("attention=moba", "attention: want a list, got 'moba'"),
    ],
)
def test_overrides_that_cannot_be_used(override: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"override {override!r}: {message}")):
        model_entry("llama-tiny", [override])


def parse(text: str) -> ModelEntry:
    return parse_entry(Source("x", "x.yaml", text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("licence: MIT", "license: MIT"), "x.yaml:3: unknown key 'license'; did you mean 'licence'?"),
        (("family: llama", ""), "x.yaml: family: missing; give it in the recipe or on the command line as family=..."),
        (("top_k: 2", "top_k: '${a}'"), "x.yaml:6: ${...} is refused"),
        ((GOOD, "- a\n- b"), "x.yaml: want a mapping of keys, got a list"),
        ((GOOD, "a: [b"), "x.yaml:1: not YAML: "),
    ],
)
def test_files_that_cannot_be_read(change: tuple[str, str], message: str) -> None:
    parse(GOOD)
    with pytest.raises(InputError, match=re.escape(message)):
        parse(GOOD.replace(*change))


def test_unknown_names_and_fields() -> None:
    with pytest.raises(InputError, match=r"model 'llama3\.1-8': no such file, .*; did you mean 'llama3\.1-8b'"):
        model_entry("llama3.1-8")
    with pytest.raises(InputError, match=r"model 'zzzzz': no such file, .*; `mobazoo models` lists what there is"):
        model_entry("zzzzz")
    with pytest.raises(InputError, match=r"model x.config: unknown key 'hiden_size'; did you mean 'hidden_size'"):
        make_config(parse(GOOD.replace("hidden_size", "hiden_size")))
    with pytest.raises(InputError, match="model x: family 'lama' is not in the zoo; did you mean 'llama'"):
        make_config(parse(GOOD.replace("llama", "lama")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("hidden_size: 8", "hidden_size: wide"), r"^model x.config: "),
        (("hidden_size: 8", "num_attention_heads: 0"), r"^model x.config: "),
        (("hidden_size: 8", "hidden_size: -32"), r"^model x.config describes no model: "),
        (("rope_type: default", "rope_type: dynamic, factor: 2.0"), r"^model x: rope type 'dynamic' is not supported"),
    ],
)
def test_values_that_no_model_has(change: tuple[str, str], message: str) -> None:
    with pytest.raises(MobazooError, match=message) as caught:
        build(parse(GOOD.replace(*change)))
    assert "\n" not in str(caught.value)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(shipped(MODELS)["qwen3/qwen3-tiny"].text.replace("2048", "100"))
    entry = model_entry(tmp_path / "mine.yaml", ["config.num_hidden_layers=2", "attention=[]"])
    assert (entry.name, entry.family, entry.attention) == ("mine", "qwen3", [])
    assert build(entry, "cpu")(ids(1, 20)).logits.shape == (1, 20, 100)
