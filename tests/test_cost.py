"""Costs are counted exactly; predicted times are checked against measured ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from mobazoo.attention import Full, MoBA
from mobazoo.cli import app
from mobazoo.config.rules import LayerAttention
from mobazoo.cost import Rates, Shape, calibrate, flops, gate_scores, layer_patterns, measure, traffic

SHAPE = Shape(heads=4, key_heads=2, head_dim=64, dtype=torch.float32, device="cpu")


def call(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


@pytest.mark.parametrize("length", [9, 24, 37])
def test_gate_scores_are_pairs_of_query_and_earlier_block(length: int) -> None:
    want = sum(t // 4 for t in range(length))
    assert gate_scores(MoBA(4, 2), length) == want
    assert gate_scores(MoBA(4, 10), length) == 0
    assert gate_scores(Full(), length) == 0


def test_flops_and_bytes_by_hand() -> None:
    # Three tokens: 6 pairs, each a product of 64 for the score and one for the value, 2 operations each, 4 heads.
    assert flops(Full(), 3, SHAPE) == 6 * 2 * 64 * 2 * 4
    # Blocks of 1, one earlier: 5 pairs and scores against 0 + 1 + 2 blocks.
    assert flops(MoBA(1, 2), 3, SHAPE) == (5 * 2 + 3) * 64 * 2 * 4
    assert traffic(Full(), 3, SHAPE) == 3 * 64 * 4 * (4 + 2 + 2 + 4)
    assert traffic(MoBA(1, 2), 3, SHAPE) == 3 * 64 * 4 * (12 + 8)


def test_break_even_by_hand() -> None:
    pattern = MoBA(64, 3)
    assert Rates(1.0, 0.5).break_even(pattern) == 193
    slow = Rates(1.0, 10.0).break_even(pattern)
    assert slow is not None
    assert Rates(1.0, 10.0).seconds(pattern, slow) < slow * (slow + 1) / 2
    assert Rates(1.0, 10.0).seconds(pattern, slow * 7 // 8) >= Rates(1.0, 10.0).seconds(Full(), slow * 7 // 8)
    assert Rates(1.0, 1e9).break_even(pattern) is None
    assert Rates(1.0, 5.0).seconds(pattern, 192) == Rates(1.0, 5.0).seconds(Full(), 192)


def test_layers_are_counted_by_pattern() -> None:
    layers = [LayerAttention(MoBA(8, 2)), LayerAttention(), LayerAttention(MoBA(8, 2))]
    assert layer_patterns(layers) == {MoBA(8, 2): 2, Full(): 1}


def test_predictions_hold_within_a_factor_of_two() -> None:
    """Stated error: how many times faster MoBA is at 16K, from runs of 4K, within a factor of 2 of what is measured."""
    patterns = [MoBA(512, 3), MoBA(128, 8)]
    full, *times = measure([Full(), *patterns], 16384, SHAPE, rounds=3)
    for pattern, moba in zip(patterns, times, strict=True):
        rates, measured = calibrate(pattern, SHAPE), full / moba
        predicted = rates.seconds(Full(), 16384) / rates.seconds(pattern, 16384)
        assert 0.5 < predicted / measured < 2, (pattern, predicted, measured)
        # The band can tell: what the short runs found, taken for any length, falls out of it.
        short = max(4096, 2 * pattern.block_size * pattern.top_k)
        found = rates.seconds(Full(), short) / rates.seconds(pattern, short)
        assert found / measured < 0.5, (pattern, found, measured)


def test_the_command_counts_predicts_and_measures() -> None:
    rules = "attention=[{pattern: moba, block_size: 128, top_k: 2}]"
    result = call("explain", "llama-tiny", "length=1024", rules, "measure=true", "rounds=1")
    assert result.exit_code == 0, result.output
    rows = {row[0]: row[1:] for row in (line.split("\t") for line in result.stdout.splitlines())}
    assert list(rows)[:5] == ["what", "keys read", "attention FLOPs", "bytes moved, at least", "KV cache"]
    assert list(rows)[5:7] == ["predicted seconds", "measured seconds"]
    assert float(rows["keys read"][2]) > 2
    assert "block 128, top 2: " in result.stdout


def test_a_setting_that_is_slower_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobazoo.cli.costs.calibrate", lambda *_: Rates(1.0, 10.0))
    rules = "attention=[{pattern: moba, block_size: 128, top_k: 2}]"
    result = call("explain", "llama-tiny", "length=300", rules)
    assert "warning: slower than full attention at 300 tokens (predicted: " in result.stderr
    assert "warning" not in call("explain", "llama-tiny", "length=100000", rules).stderr


def test_a_backend_that_rules_name_is_said_not_to_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobazoo.cli.costs.calibrate", lambda *_: Rates(1.0, 1.0))
    rules = "attention=[{pattern: moba, block_size: 128, top_k: 2, backend: %s}]"
    said = "timed with backend auto; the rules name flash, which `mobazoo bench` times"
    assert said in call("explain", "llama-tiny", rules % "flash").stdout
    assert "timed with" not in call("explain", "llama-tiny", rules % "auto").stdout


def test_without_moba_there_is_nothing_to_predict() -> None:
    result = call("explain", "llama-tiny", "attention=[{pattern: full}]")
    assert "no layer has MoBA; add rules" in result.stdout


def test_dry_run_and_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = call("explain", "llama-tiny", "length=64", "--dry-run").stdout
    assert "length: 64" in said
    (tmp_path / "again.yaml").write_text(said)
    assert call("explain", tmp_path / "again.yaml", "--dry-run").stdout == said
    for word, message in (
        ("length=0", "explain.length: want a number >= 1, got 0"),
        ("dtype=int8", "explain.dtype: want one of float32, bfloat16, float16, got 'int8'"),
        ("rounds=0", "explain.rounds: want a number >= 1, got 0"),
        (
            "device=cuda",
            "explain.device: want auto or cpu, there is no GPU here, got 'cuda'",
        ),
        ("device=toaster", "explain.device: want auto, cpu or cuda, got 'toaster'"),
        ("lenght=1", "unknown key 'lenght'; did you mean 'length'?"),
    ):
        result = call("explain", "llama-tiny", word)
        assert (result.exit_code, message in result.stderr) == (2, True), result.stderr
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    assert "binary: cannot be read as text" in call("explain", tmp_path / "binary").stderr
