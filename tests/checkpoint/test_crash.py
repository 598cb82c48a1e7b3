"""Killed at any point, or out of disk: the old folder or the new one, never a mixture, and the next run cleans up."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mobazoo.checkpoint import staging
from mobazoo.checkpoint.convert import convert
from mobazoo.checkpoint.load import load
from mobazoo.checkpoint.manifest import check_manifest
from mobazoo.config.convert import ConvertRecipe
from mobazoo.errors import InputError

from .factories import RULES, listing, save

# One process imports everything once and forks a child for each point; a child kills itself there.
KILLED = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from mobazoo.checkpoint import convert, staging, write
from mobazoo.config.convert import ConvertRecipe

def die_at(module, name, call, after=False):
    real, seen = getattr(module, name), []
    def dying(*args, **options):
        seen.append(1)
        if len(seen) == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **options)
        if len(seen) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, dying)

source, root = sys.argv[1:]
modules = {"convert": convert, "staging": staging, "write": write}
for place, point in json.loads(sys.stdin.read()).items():
    child = os.fork()
    if not child:
        if point[1] == "rename":
            staging._exchange = lambda a, b: False
            die_at(staging.Path, "rename", *point[2:])
        else:
            die_at(modules[point[0]], *point[1:])
        convert.convert(ConvertRecipe(source, f"{root}/{place}/zoo", dtype="bfloat16", overwrite=True))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, place
"""
POINTS = {
    "before_the_first_shard": ("write", "save_file", 1),
    "after_the_first_shard": ("write", "save_file", 1, True),
    "before_the_last_shard": ("write", "save_file", 7),
    "at_the_index": ("write", "write_json", 1),
    "at_the_configuration": ("convert", "write_json", 1),
    "at_the_manifest": ("convert", "write_manifest", 1),
    "while_verifying": ("convert", "verify_folders", 1),
    "before_syncing": ("staging", "_sync", 1),
    "before_the_swap": ("staging", "_swap", 1),
    "after_the_swap": ("staging", "_swap", 1, True),
    "before_removing_the_old": ("staging", "_exchange", 1, True),
    "between_two_renames": ("staging", "rename", 1, True),
    "after_two_renames": ("staging", "rename", 2, True),
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    save(root / "source", shards=True)
    for place in POINTS:
        (root / place).mkdir()
        convert(ConvertRecipe(str(root / "source"), str(root / place / "zoo"), attention=RULES, verify=False))
    command = [sys.executable, "-c", KILLED, str(root / "source"), str(root)]
    subprocess.run(command, input=json.dumps(POINTS), text=True, check=True)
    return root


@pytest.mark.parametrize("place", POINTS)
def test_killed(killed: Path, place: str) -> None:
    dest, beside = killed / place / "zoo", {path.name for path in (killed / place).iterdir()}
    if place == "between_two_renames":  # only where a system has no atomic exchange: the old folder stands beside
        assert beside == {".zoo.mobazoo-old", ".zoo.mobazoo-new"}
        whole = dest.with_name(".zoo.mobazoo-old")
    else:
        assert "zoo" in beside
        whole = dest
    new = place in ("after_the_swap", "before_removing_the_old", "after_two_renames")
    check_manifest(whole)
    load(whole, attn=None if new else "moba")
    assert json.loads((whole / "config.json").read_text())["dtype"] == ("bfloat16" if new else "float32")
    convert(ConvertRecipe(str(killed / "source"), str(dest), attention=RULES, overwrite=True, verify=False))
    assert [path.name for path in (killed / place).iterdir()] == ["zoo"]
    check_manifest(dest)


def test_two_at_once(single: Path, tmp_path: Path) -> None:
    with staging.staged(tmp_path / "zoo", replace=False) as new:
        (new / "x").write_text("")
        with pytest.raises(InputError, match="another process is writing it; wait for it to end"):
            convert(ConvertRecipe(str(single), str(tmp_path / "zoo"), verify=False))
    assert listing(tmp_path / "zoo") == {"x": b""}


def test_dest_that_appears_meanwhile(tmp_path: Path) -> None:
    (dest := tmp_path / "zoo").mkdir()
    with pytest.raises(InputError, match="appeared meanwhile"), staging.staged(dest, replace=False):
        (dest / "theirs").write_text("precious")
    assert listing(tmp_path) == {"zoo/theirs": b"precious"}


def test_what_is_written_reaches_the_disk(sharded: Path, tmp_path: Path, synced: list[Path]) -> None:
    convert(ConvertRecipe(str(sharded), str(tmp_path / "zoo"), attention=[{"layers": 0, "kconv": 3}], verify=False))
    names = [path.name for path in synced]
    assert names[-2:] == [".zoo.mobazoo-new", tmp_path.name]  # the folder before the rename, its parent after
    assert {"config.json", "model.safetensors.index.json", "model-00008-of-00008.safetensors"} <= set(names)
    assert "model-00001-of-00008.safetensors" not in names  # a link to what is there already


def test_interrupted_by_hand(tmp_path: Path) -> None:
    def interrupted() -> None:
        with staging.staged(tmp_path / "zoo", replace=False) as new:
            (new / "x").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exchange", [True, False])
def test_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "old").write_text("")
    with staging.staged(tmp_path / "zoo", replace=True) as new:
        (new / "new").write_text("")
    assert listing(tmp_path) == {"zoo/new": b""}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("where", ["mobazoo.checkpoint.write.save_file", "mobazoo.checkpoint.convert.write_json"])
def test_disk_full(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    dest = tmp_path / "zoo"
    convert(ConvertRecipe(str(sharded), str(dest), attention=RULES, verify=False))
    before = listing(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(where, full)
    with pytest.raises(InputError, match=r"zoo: disk full; nothing was changed; free some space"):
        convert(ConvertRecipe(str(sharded), str(dest), dtype="bfloat16", overwrite=True))
    assert listing(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(single: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"disk full: 117,888 bytes to write, \d+,\d+ free"):
        convert(ConvertRecipe(str(single), str(small_disk / "zoo")))
    monkeypatch.setattr("mobazoo.checkpoint.convert._room", lambda *_: None)
    for fields in ({}, {"max_shard_size": "30KB"}):  # a copy, and files written anew
        with pytest.raises(InputError, match="disk full; nothing was changed"):
            convert(ConvertRecipe(str(single), str(small_disk / "zoo"), **fields))
        assert not list(small_disk.iterdir())
