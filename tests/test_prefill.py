"""Prefill timing measures what it says; its figures are not tested, its arithmetic is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mobazoo.attention import Full, MoBA
from mobazoo.bench import prefill
from mobazoo.bench.prefill import summary, time_prefill
from mobazoo.config.bench import BenchRecipe
from mobazoo.errors import InputError
from tests.small import RULES, plain_checkpoint


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain_checkpoint(tmp_path_factory.mktemp("plain"))


def quiet(*_: Any) -> None: ...


def test_speedup_is_the_median_of_paired_ratios() -> None:
    found = summary([2.0, 9.0, 4.0], [1.0, 3.0, 1.0])
    assert (found["speedup"], found["speedup_min"], found["speedup_max"]) == (3.0, 2.0, 4.0)
    assert (found["full_median_s"], found["moba_median_s"]) == (4.0, 1.0)


def test_full_and_moba_are_timed_in_turn(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, Any]] = []

    def timed(model: Any, ids: torch.Tensor, rules: Sequence[Any]) -> float:
        model.set_attention(rules)
        calls.append((ids.shape[1], model.model.layers[0].self_attn.layer.pattern))
        return float(len(calls))

    monkeypatch.setattr(prefill, "_seconds", timed)
    told: list[Any] = []
    recipe = BenchRecipe(str(plain), RULES, lengths=[16, 64], rounds=2, dest=str(tmp_path / "time.json"))
    found = time_prefill(recipe, lambda *said: told.append(said))
    assert calls == [(n, pattern) for n in (16, 64) for _ in range(3) for pattern in (Full(), MoBA(8, 2))]
    first, second = found["prefill"]
    assert (first["full_s"], first["moba_s"]) == ([3.0, 5.0], [4.0, 6.0])  # the first pair warmed up
    # 16 tokens in blocks of 8, two of them read: everything.
    assert (first["length"], first["share_read"]) == (16, 1)
    assert second["share_read"] < 1
    assert json.loads((tmp_path / "time.json").read_text())["prefill"] == found["prefill"]
    assert told[-1] == ("prefill", 6, 6)


def test_an_interrupted_prefill_goes_on(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def timed(_: Any, ids: torch.Tensor, __: Sequence[Any]) -> float:
        lengths.append(ids.shape[1])
        if len(lengths) == 5:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(prefill, "_seconds", timed)
    recipe = BenchRecipe(str(plain), RULES, lengths=[16, 32], rounds=1, dest=str(tmp_path / "time.json"))
    with pytest.raises(KeyboardInterrupt):
        time_prefill(recipe, quiet)
    with pytest.raises(InputError, match="keeps what an interrupted run of something else measured"):
        time_prefill(replace(recipe, model="gone"), quiet)  # said before a model is looked for
    assert [row["length"] for row in time_prefill(recipe, quiet)["prefill"]] == [16, 32]
    assert lengths == [16] * 4 + [32] * 5
    assert [path.name for path in tmp_path.iterdir()] == ["time.json"]


def test_seconds_are_of_a_real_prefill(plain: Path) -> None:
    (row,) = time_prefill(BenchRecipe(str(plain), RULES, lengths=[32], rounds=1), quiet)["prefill"]
    assert min(*row["full_s"], *row["moba_s"]) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": []}, r"bench.lengths: want at least one number of tokens >= 1, got \[\]"),
        ({"lengths": [0]}, r"bench.lengths: want at least one number of tokens >= 1, got \[0\]"),
        ({"lengths": [129]}, "bench.lengths: want at most 128, the positions of .*, got 129"),
        ({"rounds": 0}, "bench.rounds: want a number >= 1, got 0"),
        ({"attention": []}, "bench.attention: no layer of .* has MoBA, so there is nothing to compare; convert it, or"),
        ({"attention": [{"pattern": "mob"}]}, "bench.attention.0..pattern: want one of full, moba, got 'mob'"),
    ],
)
def test_errors(changes: dict[str, Any], message: str, plain: Path) -> None:
    with pytest.raises(InputError, match=message):
        time_prefill(BenchRecipe(str(plain), **{"attention": RULES, "lengths": [32], **changes}), quiet)
