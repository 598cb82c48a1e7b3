"""Results are whole files that say how they came about and nothing about whose machine it was."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

import pytest

from mobazoo import results
from mobazoo.config.bench import BenchRecipe
from mobazoo.errors import InputError
from mobazoo.files import write_whole
from mobazoo.results import command, machine, read_results, write_result


def test_a_result_says_how_it_came_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/mobazoo", "bench", "prefill", "model=a b"])
    path = write_result(tmp_path / "new" / "time.json", "bench", BenchRecipe("a b"), {"prefill": []})
    said = json.loads(path.read_text())
    assert said["mobazoo"] == "bench"
    assert said["command"] == "mobazoo bench prefill 'model=a b'"
    assert said["recipe"]["model"] == "a b"
    assert said["prefill"] == []
    assert list(path.parent.iterdir()) == [path]
    assert read_results(path.parent) == {"time": said}


def test_the_command_of_a_module_is_the_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/mobazoo/__main__.py", "models"])
    assert command() == "mobazoo models"


def test_the_machine_has_no_name_and_no_paths() -> None:
    said = machine()
    assert {"cpu", "threads", "torch", "python", "mobazoo", "commit", "date"} <= said.keys()
    assert platform.node() not in said.values()
    assert not any(value.startswith("/") or str(Path.home()) in value for value in said.values())


def test_a_package_in_a_foreign_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.system(f"git init -q {tmp_path}")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    assert machine()["commit"] == "unknown"


def test_without_git_and_proc_there_is_still_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(results.subprocess, "run", gone)
    monkeypatch.setattr(results.Path, "read_text", gone)
    said = machine()
    assert said["commit"] == "unknown"
    assert said["cpu"]


def test_other_json_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "list.json").write_text("[1]")
    assert read_results(tmp_path) == {}


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/a\.json: cannot be written: .*/file is no folder that takes files"):
        write_result(tmp_path / "file" / "a.json", "bench", BenchRecipe("m"), {})
    with pytest.raises(InputError, match=r"file/a\.json: cannot be written: File exists; give another dest"):
        write_whole(tmp_path / "file" / "a.json", "{}")
    with pytest.raises(InputError, match="xxx: cannot be written: File name too long; give another dest"):
        write_result(tmp_path / ("x" * 300), "bench", BenchRecipe("m"), {})
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(InputError, match=r"torn\.json: cannot be read as JSON"):
        read_results(tmp_path)
