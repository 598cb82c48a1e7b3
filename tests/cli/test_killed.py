"""A run that is killed between a whole result and its stamp, or in the middle of a sweep, goes on by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mobazoo.cli import app
from mobazoo.files import MARK
from tests.small import plain_checkpoint

# One process imports everything once and forks a child for each kill; what is left is for the next child.
KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from mobazoo.bench import sweep
from mobazoo.checkpoint import convert
from mobazoo.cli import main, stages

def die_at(module, name, call):
    real, seen = getattr(module, name), []
    def dying(*args, **options):
        seen.append(1)
        if len(seen) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    setattr(module, name, dying)

row, place = sweep._row, Path(sys.argv.pop())
def told(point, *args):
    with (place / "timed").open("a") as file:
        print(point.length, file=file)
    return row(point, *args)
sweep._row = told

for module, name, call in ((stages, "write_whole", 1), (sweep, "_row", 2), (stages, "write_whole", 1)):
    child = os.fork()
    if not child:
        die_at(module, name, call)
        main()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, (name, call)
    if not (place / "out" / ".stages").exists():
        for left in ("moba.training", ".moba.mobazoo-old"):
            (place / "out" / left).mkdir()
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("killed")
    plain_checkpoint(place / "plain")
    (place / "sweep.yaml").write_text(
        "lengths: [64, 96, 128]\nblocks: [{top_k: 2, block_size: 16}]\nhead_dim: 16\nrounds: 1\ndevice: cpu\n"
    )
    (place / "run.yaml").write_text(f"""
folder: {place / "out"}
stages:
  - {{verb: convert, recipe: moba-64x3, with: {{source: {place / "plain"}, dest: "{{folder}}/moba", verify: false}}}}
  - {{verb: bench, recipe: {place / "sweep.yaml"}, with: {{dest: "{{folder}}/sweep.json"}}}}
""")
    command = [sys.executable, "-c", KILLED, "run", str(place / "run.yaml"), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return place


def test_a_whole_result_without_its_stamp_is_known_again(killed: Path) -> None:
    folder = killed / "out"
    assert sorted(path.name for path in (folder / ".stages").iterdir()) == ["01-convert.json"]
    assert (folder / "moba" / MARK).is_file()
    assert json.loads((folder / "sweep.json").read_text())["sweep"]
    plan = CliRunner().invoke(app, ["run", str(killed / "run.yaml"), "--dry-run"])
    assert plan.stdout.count("(done, would be skipped)") == 2
    assert not (folder / ".stages" / "02-bench.json").exists()
    again = CliRunner().invoke(app, ["run", str(killed / "run.yaml")])
    assert again.exit_code == 0, again.output
    lines = [line.split("\t") for line in again.stdout.splitlines()[-2:]]
    assert [(line[3], line[4]) for line in lines] == [
        ("skipped", f"wrote {folder / name}, before the run was killed") for name in ("moba", "sweep.json")
    ]
    # What may have been left beside them is gone, but not another verb's.
    assert sorted(path.name for path in folder.iterdir()) == [".stages", "moba", "moba.training", "sweep.json"]


def test_a_sweep_goes_on_where_it_was_killed(killed: Path) -> None:
    # The kill came before the second was timed; the first was not timed again.
    assert (killed / "timed").read_text().split() == ["64", "96", "128"]


def test_a_result_of_another_stage_is_not_taken(killed: Path) -> None:
    """As where somebody has converted to the same place meanwhile."""
    (killed / "out" / ".stages" / "01-convert.json").unlink(missing_ok=True)
    (killed / "out" / "moba" / MARK).write_text("another")
    again = CliRunner().invoke(app, ["run", str(killed / "run.yaml")])
    assert again.exit_code == 2
    assert "moba: exists; pass overwrite=true to replace it, or choose another dest" in again.stderr
    again = CliRunner().invoke(app, ["run", str(killed / "run.yaml"), "stages[0].with.overwrite=true"])
    assert again.exit_code == 0, again.output
    assert (killed / "out" / "moba" / MARK).read_text() not in ("another", "")
