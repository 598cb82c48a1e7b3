"""tokenizer and train on the command line: every shipped recipe dry-runs and fits its model."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mobazoo.cli import app
from mobazoo.cli.verbs import train as verb
from mobazoo.config.data import Data
from mobazoo.config.shipped import RECIPES, shipped
from mobazoo.config.tokenizer import TokenizerRecipe
from mobazoo.data.bpe import train_tokenizer
from mobazoo.train.setup import prepare

TRAIN = {name: source for name, source in shipped(RECIPES).items() if name.startswith("train/")}
GIVEN = {"model": "org/model", "tokenizer": "org/tokenizer", "dest": "there", "data.path": "org/data"}


def call(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


def given(text: str, **values: str) -> list[str]:
    """What a recipe leaves open, said."""
    keys = [line.split(":")[0] for line in text.splitlines() if line.endswith(": ???")]
    keys += ["data.path"] if 'path: "???"' in text else []
    return [f"{key}={({**GIVEN, **values})[key]}" for key in keys]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    dest = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer(TokenizerRecipe(str(dest), Data("stdlib", files=["json/*.py"]), vocab=300, max_length=64))
    return str(dest)


@pytest.mark.parametrize("name", TRAIN)
def test_shipped_runs_dry_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("train", name, *given(TRAIN[name].text), "--dry-run")
    assert result.exit_code == 0, result.output
    assert "# would write there" in result.stdout
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "again.yaml").write_text(result.stdout)  # what it prints is the recipe
    assert call("train", "again.yaml", "--dry-run").stdout == result.stdout


@pytest.mark.parametrize("name", [name for name, source in TRAIN.items() if "\nmodel: ???" not in source.text])
def test_shipped_runs_fit_their_models(name: str, tokenizer: str) -> None:
    setup = prepare(verb.resolve(name, given(TRAIN[name].text, tokenizer=tokenizer)))
    assert setup.random
    assert setup.parameters > 10**6


def test_the_long_run_resolves(tmp_path: Path) -> None:
    result = call("run", "continue-8b-1m", f"folder={tmp_path / 'runs'}", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "stage 7 of 7: train continue-8b" in result.stdout
    assert "rows of 1048576" in result.stdout


def test_from_nothing_to_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    small = "data={path: stdlib, files: [json/*.py]}"
    done = call("tokenizer", "tokenizer/stdlib", f"dest={folder}", small, "vocab=300")
    assert done.exit_code == 0, done.output
    assert "300 tokens from 5 documents" in done.stdout
    sizes = "config={vocab_size: 300, hidden_size: 32, intermediate_size: 48, head_dim: 8}"
    words = ("train", "tiny-moba-then-full", f"tokenizer={folder}", f"dest={tmp_path / 'out'}", small, sizes)
    more = ("validation=null", "length=64", "batch=2", "tokens=1000", "checkpoint_every=3")
    dry = call(*words, *more, "--dry-run")
    assert "would do 8 steps of 2 rows of 64: 16 rows, 1.02K tokens" in dry.stdout
    done = call(*words, *more)
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'out'}: 8 steps" in done.stdout
    again = call(*words, *more)
    assert again.exit_code == 2
    assert "exists; pass overwrite=true" in again.stderr
