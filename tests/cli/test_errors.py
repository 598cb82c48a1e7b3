"""What goes wrong for a user, through the real entry point: exit 2, one line, nothing half-written.

One process imports everything once and forks a child for each case, which calls ``mobazoo.cli.main``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.factories import edit_config, listing, save

FORKS = """
import json, os, resource, sys, traceback
import torch
torch.set_num_threads(1)
import mobazoo.checkpoint.convert, mobazoo.cli, mobazoo.cli.describe, mobazoo.generate
for case in json.loads(sys.stdin.read()):
    child = os.fork()
    if not child:
        for stream in ("stdout", "stderr"):
            handle = os.open(f"{case['said']}.{stream}", os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, getattr(sys, stream).fileno())
        os.environ.update(case["env"])
        if case["largest"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (case["largest"], case["largest"]))
        os.chdir(case["place"])
        sys.argv = ["mobazoo", *case["args"]]
        try:
            mobazoo.cli.main()
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code or 0)  # taking an interpreter with torch apart takes a second
    with open(f"{case['said']}.code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
SHARD = "model-00001-of-00007.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Case:
    """A change to a sharded checkpoint ``hf``, a command beside it and what its one line says.

    ``largest`` is the size in bytes above which no file can be written.
    """

    message: str
    change: Callable[[Path], object] = lambda folder: None
    command: str = "convert moba-512x3 source=hf dest=zoo"
    env: dict[str, str] = field(default_factory=dict)
    largest: int = 0


def truncate(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1000])


def point_outside(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../other.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def pickle_only(folder: Path) -> None:
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def widen(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        held = {name: torch.zeros(33) if name == "model.norm.weight" else t for name, t in load_file(path).items()}
        save_file(held, path, metadata={"format": "pt"})


def fill(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "zoo")


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
CASES = {
    "no folder": Case("nothing: no such folder (a Hub id looks like org/name)", command="show ./nothing"),
    "not a checkpoint": Case(
        "not a checkpoint folder: it has no config.json", lambda folder: (folder / "config.json").unlink()
    ),
    "missing shard": Case(f"{SHARD}: missing; fetch the checkpoint again", lambda folder: (folder / SHARD).unlink()),
    "truncated shard": Case("truncated: 1000 of ", truncate),
    "path out of the folder": Case("file '../other.safetensors' is outside the folder", point_outside),
    "pickles": Case("hf: only pickled weights (pytorch_model.bin), which can run code when loaded", pickle_only),
    "wrong shapes": Case("tensors do not fit its moba_llama config: 1 wrong shape: model.norm.weight is [33]", widen),
    "architecture": Case(
        "model_type 'gemma3' is not supported; known: llama, qwen2, qwen3",
        lambda folder: edit_config(folder, model_type="gemma3"),
    ),
    "rope type": Case(
        "hf: rope type 'dynamic' is not supported; known: default, linear, llama3, yarn",
        lambda folder: edit_config(folder, rope_parameters=DYNAMIC),
    ),
    "sliding window": Case(
        "layer_types[2] is 'sliding_attention': zoo models have no such layers",
        lambda folder: edit_config(
            folder,
            model_type="qwen2",
            architectures=["Qwen2ForCausalLM"],
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=2,
        ),
    ),
    "recipe key": Case(
        "override 'atention=[]': unknown key 'atention'; did you mean 'attention'?",
        command="convert moba-512x3 source=hf dest=zoo atention=[]",
    ),
    "rule": Case(
        "attention[0].block_size: want an integer >= 1, got 0",
        command="convert moba-512x3 source=hf dest=zoo attention[0].block_size=0",
    ),
    "recipe": Case("did you mean 'moba-512x3'?", command="convert moba-512x33 source=hf dest=zoo"),
    "destination": Case("zoo: exists; pass overwrite=true to replace it, or choose another dest", fill),
    "no room": Case(
        "zoo: cannot be written: ", command="convert moba-512x3 source=hf dest=zoo dtype=bfloat16", largest=6000
    ),
    "no network": Case(
        "org/model: no such folder, not complete in the Hub cache, and the Hub cannot be reached; check the network",
        command="convert moba-512x3 source=org/model dest=zoo",
    ),
    "offline": Case(
        "org/model: no such folder, not complete in the Hub cache, and HF_HUB_OFFLINE is set",
        command="generate org/model --prompt x",
        env={"HF_HUB_OFFLINE": "1"},
    ),
    "no tokenizer": Case(
        "hf: has no tokenizer (tokenizer.json, tokenizer.model, vocab.json); copy the tokenizer's files from the model",
        command="generate hf --prompt x",
    ),
    "broken tokenizer": Case(
        "hf: its tokenizer does not load: ",
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        command="generate hf --prompt x",
    ),
    "model file": Case(
        "mine.yaml: family: missing; give it in the recipe or on the command line as family=...",
        lambda folder: (folder.parent / "mine.yaml").write_text("config: {}\n"),
        command="show mine.yaml",
    ),
    "backend": Case(
        "layer 0: backend 'sdpa' cannot do this: sdpa computes full attention only",
        lambda folder: (folder / "tokenizer.json").write_text(
            json.dumps(
                {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}}
            )
        ),
        command="generate hf --prompt x 'attention=[{pattern: moba, block_size: 4, top_k: 2, backend: sdpa}]'",
    ),
}


def everything(place: Path) -> tuple[set[Path], dict[str, bytes]]:
    """All paths, empty folders too, and what the files hold."""
    return set(place.rglob("*")), listing(place)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str, bool]]:
    """Exit code, stdout, stderr of every case, and whether all files were afterwards as before."""
    root, jobs, before = tmp_path_factory.mktemp("errors"), [], {}
    save(root / "hf", shards=True)
    for number, (name, case) in enumerate(CASES.items()):
        place = root / f"place{number}"
        shutil.copytree(root / "hf", place / "hf")
        case.change(place / "hf")
        before[name] = everything(place)
        job = {"place": str(place), "args": shlex.split(case.command), "said": str(root / f"said{number}")}
        jobs.append({**job, "env": case.env, "largest": case.largest})
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_HOME": str(root / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}  # where nobody listens
    command = [sys.executable, "-c", FORKS]
    subprocess.run(command, input=json.dumps(jobs), text=True, check=True, env=env)
    found = {}
    for number, name in enumerate(CASES):
        code, out, err = ((root / f"said{number}.{part}").read_text() for part in ("code", "stdout", "stderr"))
        found[name] = (int(code), out, err, everything(root / f"place{number}") == before[name])
    return found


@pytest.mark.parametrize("name", CASES)
def test_one_line_exit_2_and_nothing_written(name: str, said: dict[str, tuple[int, str, str, bool]]) -> None:
    code, out, err, unchanged = said[name]
    assert CASES[name].message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert (code, out) == (2, "")
    assert unchanged
