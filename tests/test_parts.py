"""Pieces of a measurement count for what they were measured with, and nothing else takes or loses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mobazoo.config.bench import BenchRecipe
from mobazoo.errors import InputError
from mobazoo.parts import Parts


def test_pieces_are_measured_once_and_forgotten_at_the_end(tmp_path: Path) -> None:
    dest, recipe = tmp_path / "a.json", BenchRecipe("m")
    assert Parts(dest, recipe).get("x", lambda: (1, 2)) == [1, 2]  # as JSON keeps it
    again = Parts(dest, replace(recipe, dest="elsewhere"))
    assert again.get("x", lambda: 3) == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == [".a.json.parts"]
    again.done()
    assert list(tmp_path.iterdir()) == []
    assert Parts(None, recipe).get("x", lambda: 4) == 4
    assert list(tmp_path.iterdir()) == []


def test_pieces_of_something_else_are_refused_and_stay(tmp_path: Path) -> None:
    dest, recipe, model = tmp_path / "a.json", BenchRecipe("m"), tmp_path / "model"
    model.mkdir()
    (model / "a.safetensors").write_text("a")
    about = {"threads": "2"}
    Parts(dest, recipe, str(model), about).get("x", lambda: 1)
    kept = (tmp_path / ".a.json.parts").read_bytes()

    def refused(said: str, *given: object) -> None:
        why = rf"keeps what an interrupted run of something else measured \({said}\); go on with the same, or remove it"
        with pytest.raises(InputError, match=rf"\.a\.json\.parts: {why} to begin anew"):
            Parts(dest, *given)  # type: ignore[arg-type]

    refused("rounds: 3 there, 5 here", replace(recipe, rounds=5), str(model), about)
    refused("threads: '2' there, '4' here", recipe, str(model), {"threads": "4"})
    (model / "a.safetensors").write_text("other weights")
    refused(r"weights: '\w{12}' there, '\w{12}' here", recipe, str(model), about)
    assert (tmp_path / ".a.json.parts").read_bytes() == kept


@pytest.mark.parametrize("torn", ["torn", "[]", "{}", '{"of": 1, "parts": {}}'])
def test_a_file_that_holds_none(torn: str, tmp_path: Path) -> None:
    (tmp_path / ".a.json.parts").write_text(torn)
    message = r"\.a\.json\.parts: holds no parts of an interrupted measurement \(.*\); remove it to begin anew"
    with pytest.raises(InputError, match=message):
        Parts(tmp_path / "a.json", BenchRecipe("m"))
