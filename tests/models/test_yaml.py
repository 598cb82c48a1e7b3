"""The zoo's model files: every one is read, built on ``meta`` and counted."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch

from mobazoo.attention import Full, MoBA
from mobazoo.config.models import model_entry, model_names, parse_entry
from mobazoo.errors import InputError
from mobazoo.zoo import build, families, make_config
from tests.models.tiny import STOCK, ids

GOOD = """
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
        ("top_k", "override 'top_k': want key=value"),
        ("=3", "override '=3': want key=value"),
        ("attention[9].top_k=3", r"override 'attention\[9\].top_k=3': "),
        ("parameters=[", r"override 'parameters=\[': "),
        ("licence=${oc.env:HOME}", r"override licence: \$\{...\} is not allowed"),
        ("attentions=[]", "model llama-tiny: unknown key 'attentions'; did you mean 'attention'"),
        ("attention[0].topk=3", "unknown key 'topk'; did you mean 'top_k'"),
        ("parameters=many", "model llama-tiny.parameters: want int, got 'many'"),
        ("attention=moba", "moba.attention: want a list of rules"),
    ],
)
def test_overrides_that_cannot_be_used(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model_entry("llama-tiny", [override])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("licence: MIT", "license: MIT"), "model x: unknown key 'license'; did you mean 'licence'"),
        (("licence: MIT", ""), "model x.licence: want str, got None"),
        (("top_k: 2", "top_k: '${a}'"), r"model x.attention\[0\].top_k: \$\{...\} is not allowed, got '\$\{a\}'"),
        ((GOOD, "- a\n- b"), "model x: want a mapping with config"),
        ((GOOD, "a: [b"), "model x: not YAML: "),
    ],
)
def test_files_that_cannot_be_read(change: tuple[str, str], message: str) -> None:
    parse_entry("x", "llama", GOOD)
    with pytest.raises(InputError, match=message):
        parse_entry("x", "llama", GOOD.replace(*change))


def test_unknown_names_and_fields() -> None:
    with pytest.raises(InputError, match=r"unknown model 'llama3\.1-8'; did you mean 'llama3\.1-8b'"):
        model_entry("llama3.1-8")
    with pytest.raises(InputError, match="unknown model 'zzzzz'; known: llama-tiny, "):
        model_entry("zzzzz")
    entry = parse_entry("x", "llama", GOOD.replace("hidden_size", "hiden_size"))
    with pytest.raises(InputError, match=r"model x.config: unknown key 'hiden_size'; did you mean 'hidden_size'"):
        make_config(entry)
