"""Recipes: overrides that reach into lists, a round trip, and every error in one line that says where."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from mobazoo.config.convert import ConvertRecipe
from mobazoo.config.recipe import load_recipe, parse_recipe, plain, to_yaml
from mobazoo.config.rules import Rule
from mobazoo.config.shipped import MODELS, RECIPES, Source, find, shipped
from mobazoo.errors import InputError


@dataclass
class Rope:
    kind: Literal["linear", "yarn"] = "linear"
    factor: float = 1.0


@dataclass
class Schema:
    source: str
    dest: str
    attention: list[dict[str, Any]] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)
    rope: Rope | None = None
    steps: int = 3
    dtype: str | None = None
    size: int | str | None = None
    verify: bool = True


TEXT = """# What it is for.
# mobazoo convert x
source: a
dest: b
attention:
  - {layers: ":", pattern: moba, block_size: 4, top_k: 2}
  - {layers: "-3:", pattern: full}
"""


def load(text: str, *overrides: str) -> Schema:
    return parse_recipe(Source("x", "x.yaml", text), overrides, Schema)


@pytest.mark.parametrize(
    ("override", "key", "want"),
    [
        ("steps=4", "steps", 4),
        ("verify=false", "verify", False),
        ("dest=007", "dest", "007"),
        ("dest=1e3", "dest", "1e3"),
        ("dest=a: b", "dest", "a: b"),
        ("dest=", "dest", ""),
        ("dtype=null", "dtype", None),
        ("size=5GB", "size", "5GB"),
        ("size=5", "size", 5),
        ("attention=[]", "attention", []),
    ],
)
def test_override(override: str, key: str, want: object) -> None:
    assert getattr(load(TEXT, override), key) == want


def test_overrides_reach_into_lists() -> None:
    found = load(TEXT, "attention[0].top_k=4", "attention[1].layers=-2:", "attention[-1].pattern=moba").attention
    assert found[0] == {"layers": ":", "pattern": "moba", "block_size": 4, "top_k": 4}
    assert found[1] == {"layers": "-2:", "pattern": "moba"}


def test_overrides_reach_into_what_the_recipe_leaves_out() -> None:
    assert load(TEXT, "rope.factor=4").rope == Rope("linear", 4.0)
    assert load(TEXT, "rope={kind: yarn, factor: 2}", "rope.factor=8").rope == Rope("yarn", 8.0)


def test_rules_become_rules_where_the_schema_says_so() -> None:
    assert load(TEXT, "rules=[{layers: 0, pattern: full}]").rules == [Rule(layers=0, pattern="full")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sorce=1", "unknown key 'sorce'; did you mean 'source'?"),
        ("attention[0].topk=3", "attention[0]: unknown key 'topk'; did you mean 'top_k'?"),
        ("rope.x=3", "rope: unknown key 'x'; known: kind, factor"),
        ("steps=x", "steps: want an integer, got 'x'"),
        ("steps=2.5", "steps: want an integer, got 2.5"),
        ("steps=true", "steps: want an integer, got True"),
        ("steps=", "steps: want an integer, got nothing"),
        ("verify=maybe", "verify: want true or false, got 'maybe'"),
        ("rope.kind=lin", "rope.kind: want one of linear, yarn, got 'lin'"),
        ("rope=3", "rope: want a mapping with the keys kind, factor, got 3"),
        ("attention=3", "attention: want a list, got 3"),
        ("attention=[{layers: 0, pattern: mobba}]", "attention[0].pattern: want one of full, moba, got 'mobba'"),
        ("attention[0].block_size=0", "attention[0].block_size: want an integer >= 1, got 0"),
        ("attention[7].top_k=3", "attention has 2 items, counted from 0; give the whole list, attention=[...], to add"),
        ("rules[0].top_k=3", "rules is not set; give the whole list, rules=[...], to add to it"),
        ("steps.x=2", "steps: no mapping, so it has no key 'x'; it is an integer"),
        ("source[0]=1", "source: no list, so it has no item 0; it is text"),
        ("attention=[{a: 1", "not YAML: did not find expected ',' or '}'"),
        ("dest=???", "dest: missing; give it in the recipe or on the command line as dest=..."),
        ("steps", "want key=value, like attention[0].top_k=4"),
        ("=3", "want key=value, like attention[0].top_k=4"),
        (
            "source=${oc.env:HOME}",
            "${...} is refused, because a recipe is printed, stored in",
        ),
    ],
)
def test_bad_override_is_one_line_that_names_it(override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load(TEXT, override)
    assert str(error.value).startswith(f"override {override!r}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            TEXT.replace("dest: b\n", ""),
            "x.yaml: dest: missing; give it in the recipe or on the",
        ),
        (
            "steps: 3",
            "x.yaml: source, dest: missing; give it in the recipe or on the command line as source=...",
        ),
        (TEXT + "steps: [\n", "x.yaml:9: not YAML: expected the node content"),
        (TEXT + "steps: 2\nsteps: 3\n", "x.yaml:9: not YAML: found duplicate key steps"),
        (TEXT + "dtype: ${source}\n", "x.yaml:8: ${...} is refused"),
        (TEXT + "? ${source}\n: 1\n", "x.yaml:8: ${...} is refused"),
        (TEXT + "sorce: 3\n", "x.yaml:8: unknown key 'sorce'; did you mean 'source'?"),
        (TEXT + "steps: no\n", "x.yaml:8: steps: want an integer, got False"),
        (TEXT + "dtype: 7\n", "x.yaml:8: dtype: want text, got 7; quote it"),
        (TEXT.replace("top_k: 2", "top_k: two"), "x.yaml:6: attention[0].top_k: want an integer, got 'two'"),
        (TEXT.replace("top_k: 2", "topk: 2"), "x.yaml:6: attention[0]: unknown key 'topk'; did you mean 'top_k'?"),
        (TEXT.replace("full", "fulll"), "x.yaml:7: attention[1].pattern: want one of full, moba, got 'fulll'"),
        ("", "x.yaml: source, dest: missing"),
        ("hello", "x.yaml: want a mapping of keys, got no key"),
        ("- a\n- b", "x.yaml: want a mapping of keys, got a list"),
        ("source: !!python/object:os.system x", "x.yaml:1: not YAML: could not determine a constructor"),
    ],
)
def test_bad_recipe_is_one_line_with_its_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_yaml_round_trip() -> None:
    recipe = load(TEXT, "rope.factor=2", "dtype='7'", "rules=[{layers: -1, kconv: 3}]")
    assert load(to_yaml(recipe)) == recipe
    assert plain(recipe)["rules"] == [{"layers": -1, "kconv": 3}]


def test_a_file_is_found_by_path_and_a_shipped_one_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TEXT)
    assert load_recipe(tmp_path / "mine.yaml", ["steps=9"], Schema).steps == 9
    names = ("convert/to-hf", "to-hf", "recipes/convert/to-hf.yaml")
    assert len({find(name).text for name in names}) == 1
    assert find("llama-tiny", MODELS).name == "llama/llama-tiny"


def test_what_is_not_there_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"recipe 'moba-4096x13'.*did you mean 'moba-4096x12'\?"):
        find("moba-4096x13")
    with pytest.raises(InputError, match="`mobazoo recipes` lists what there is"):
        find("zzz")
    with pytest.raises(InputError, match="want a recipe file, got a folder"):
        find(tmp_path)
    twice = {name: Source(name, name, "") for name in ("a/same", "b/same")}
    with monkeypatch.context() as patch:
        patch.setattr("mobazoo.config.shipped.shipped", lambda _: twice)
        with pytest.raises(InputError, match="recipe 'same' is in several folders; say one of a/same, b/same"):
            find("same")
        assert find("same", folder="b").name == "b/same"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as text"):
        find(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", [name for name in shipped(RECIPES) if name.startswith("convert/")])
def test_shipped_conversions_load(name: str) -> None:
    recipe = load_recipe(name, ["source=a", "dest=b"], ConvertRecipe)
    recipe.check()
    assert parse_recipe(Source("x", "x", to_yaml(recipe)), [], ConvertRecipe) == recipe


@pytest.mark.parametrize("source", shipped(RECIPES).values(), ids=lambda source: source.name)
def test_shipped_recipes_say_what_they_are_for_and_their_command(source: Source) -> None:
    assert len(source.purpose) > 20
    words = source.command.split()
    assert words[:2] == ["mobazoo", source.name.split("/")[0] if "/" in source.name else "run"]
    assert find(words[2], RECIPES, words[1]).name == source.name
