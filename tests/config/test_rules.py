"""Per-layer rules: slices, overriding, and every refusal."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobazoo.attention import Full, MoBA
from mobazoo.config.rules import (
    LayerAttention,
    Rule,
    join_rules,
    moba_rules,
    parse_rules,
    resolve,
    resolve_layer,
)
from mobazoo.errors import InputError

PAPER = [
    {"layers": ":", "pattern": "moba", "block_size": 4096, "top_k": 12, "backend": "flash"},
    {"layers": "-3:", "pattern": "full"},
]


def test_later_rules_override_only_the_fields_they_name() -> None:
    layers = resolve(parse_rules(PAPER), 5)
    assert layers[:2] == (LayerAttention(MoBA(4096, 12), "flash"),) * 2
    assert layers[2:] == (LayerAttention(Full(), "flash"),) * 3
    again = [*PAPER, {"layers": -1, "pattern": "moba", "top_k": 4, "backend": "auto", "decode": "moba", "kconv": 3}]
    assert resolve(parse_rules(again), 5)[4] == LayerAttention(MoBA(4096, 4), "auto", "moba", 3)


def test_no_rules_are_full_attention() -> None:
    assert resolve(parse_rules(None), 2) == resolve(parse_rules([]), 2) == (LayerAttention(),) * 2


def test_decoding_is_full_unless_asked() -> None:
    assert LayerAttention(MoBA(4, 2)).decode_pattern == Full()
    assert LayerAttention(MoBA(4, 2), decode="moba").decode_pattern == MoBA(4, 2)


@given(
    st.integers(1, 9), st.tuples(*[st.none() | st.integers(-11, 11)] * 2, st.none() | st.sampled_from([-2, -1, 1, 3]))
)
def test_slices_are_those_of_python(count: int, parts: tuple[int | None, int | None, int | None]) -> None:
    text = ":".join("" if part is None else str(part) for part in parts)
    layers = resolve([Rule(layers=text, pattern="moba", block_size=2, top_k=2)], count)
    assert [n for n, layer in enumerate(layers) if layer.pattern != Full()] == sorted(range(count)[slice(*parts)])


def test_a_layer_alone_is_as_among_all() -> None:
    rules = parse_rules(PAPER)
    assert tuple(resolve_layer(rules, n, 7) for n in range(7)) == resolve(rules, 7)


def test_a_layer_number_may_be_written_as_text() -> None:
    assert resolve(parse_rules([{"layers": "1", "decode": "moba"}]), 2)[1].decode == "moba"


RULES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "layers": st.sampled_from([":", "0", 1, "-2:", "::2", "0:"]),
            "pattern": st.sampled_from(["full", "moba", None]),
            "block_size": st.integers(1, 4),
            "top_k": st.integers(1, 4),
            "backend": st.sampled_from(["auto", "flash"]),
            "decode": st.sampled_from(["full", "moba"]),
            "kconv": st.sampled_from([0, 3]),
        },
    ),
    max_size=5,
)
SIZES: dict[str, Any] = {"block_size": 9, "top_k": 9}  # so that moba always has its sizes


@given(RULES, RULES)
def test_joined_rules_are_the_later_ones_after_the_models_own(own: list[Any], later: list[Any]) -> None:
    joined = join_rules([SIZES, *own], later)
    assert resolve(parse_rules(joined), 4) == resolve(parse_rules([SIZES, *own, *later]), 4)
    assert resolve(parse_rules(join_rules(joined, later)), 4) == resolve(parse_rules(joined), 4)
    everywhere = [{"layers": ":", "pattern": "full", "backend": "auto", "decode": "full", "kconv": 0}, PAPER[0]]
    assert join_rules(joined, [*everywhere, *later]) == join_rules([], [*everywhere, *later])  # lists do not grow


def test_joining_says_whose_rule_is_wrong() -> None:
    with pytest.raises(InputError, match=r"^moba.attention\[0\]: unknown key 'topk'"):
        join_rules([{"topk": 3}], [])
    with pytest.raises(InputError, match=r"^attention\[0\]: unknown key 'topk'"):
        join_rules([*PAPER], [{"topk": 3}])


def test_rules_as_plain_data_name_what_they_say() -> None:
    assert [rule.as_dict() for rule in parse_rules(PAPER)] == PAPER


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"topk": 3}], r"attention\[0\]: unknown key 'topk'; did you mean 'top_k'\?"),
        ([{}, {"zzz": 3}], r"attention\[1\]: unknown key 'zzz'; known: layers, pattern, block_size, top_k, backend, "),
        (["moba"], r"attention\[0\]: want a mapping like {layers: ':', pattern: moba, ...}, got 'moba'"),
        ("moba", r"attention: want a list of rules .*, got 'moba'"),
        ({"pattern": "moba"}, r"attention: want a list of rules"),
        (3, r"attention: want a list of rules .*, got 3"),
        ([{"pattern": "sparse"}], r"attention\[0\].pattern: want one of full, moba, got 'sparse'"),
        ([{"decode": "dense"}], r"attention\[0\].decode: want one of full, moba, got 'dense'"),
        ([{"kconv": 4}], r"attention\[0\].kconv: want one of 0, 3, 5, got 4"),
        ([{"block_size": 0}], r"attention\[0\].block_size: want an integer >= 1, got 0"),
        ([{"top_k": True}], r"attention\[0\].top_k: want an integer >= 1, got True"),
        ([{"top_k": "3"}], r"attention\[0\].top_k: want an integer >= 1, got '3'"),
        ([{"backend": 3}], r"attention\[0\].backend: want auto or the name of a backend, got 3"),
    ],
)
def test_rules_that_cannot_be_read(rules: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_rules(rules)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"layers": 4}, r"attention\[0\].layers: layer 4 is not there; the model has 4"),
        ({"layers": -5}, r"layer -5 is not there; the model has 4"),
        ({"layers": "a:"}, r"attention\[0\].layers: want a layer number or a Python slice like .*, got 'a:'"),
        ({"layers": "::0"}, r"got '::0'"),
        ({"layers": "1:2:3:4"}, r"got '1:2:3:4'"),
        ({"layers": True}, r"got True"),
        ({"layers": [0, 1]}, r"got \[0, 1\]"),
        ({"pattern": "moba"}, r"attention: layer 0: pattern moba needs block_size and top_k"),
        ({"layers": 2, "pattern": "moba", "top_k": 2}, r"attention: layer 2: pattern moba needs block_size$"),
    ],
)
def test_rules_that_do_not_resolve(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(parse_rules([rule]), 4)


def test_the_object_of_a_checkpoint() -> None:
    assert moba_rules(None) == moba_rules({"provenance": {"from": "somewhere"}}) == ()
    assert moba_rules({"attention": PAPER}) == parse_rules(PAPER)
    with pytest.raises(InputError, match="moba: unknown key 'atention'; did you mean 'attention'"):
        moba_rules({"atention": PAPER})
    with pytest.raises(InputError, match=r"moba: want a mapping like .*, got \[1\]"):
        moba_rules([1])  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"moba.attention\[0\].top_k: want an integer"):
        moba_rules({"attention": [{"top_k": 0}]})


def test_rules_need_no_torch() -> None:
    code = "import sys, mobazoo.config.rules, mobazoo.config.models; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
