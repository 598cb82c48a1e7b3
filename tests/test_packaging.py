"""The wheel holds every package, family and recipe, and adds one top-level name."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# Where folders of the repository live once installed.
INSTALLED = {"mobazoo": "mobazoo", "models": "mobazoo/models", "recipes": "mobazoo/recipes"}


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files behind
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in tracked:
        if (REPOSITORY / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_everything_is_inside(contents: set[str]) -> None:
    expected = {
        installed + path.relative_to(REPOSITORY / folder).as_posix().join(["/", ""])
        for folder, installed in INSTALLED.items()
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in {".py", ".yaml", ".md", ".typed", ".cpp", ".h"} and "__pycache__" not in path.parts
    }
    assert expected
    assert not expected - contents


def test_one_top_level_name(contents: set[str]) -> None:
    assert {name.split("/")[0].split("-")[0] for name in contents} == {"mobazoo"}
