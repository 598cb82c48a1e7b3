"""Damaged and hostile folders: each is refused with one line that names what and where."""

import json
import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mobazoo.checkpoint.compare import CheckpointMismatchError
from mobazoo.checkpoint.folder import inside, open_folder
from mobazoo.checkpoint.header import read_header
from mobazoo.checkpoint.load import load
from mobazoo.checkpoint.manifest import MANIFEST, check_manifest, write_manifest
from mobazoo.errors import InputError, MobazooError, UnsupportedError

from .factories import edit_config, save

INDEX = "model.safetensors.index.json"


def refused(folder: Path, match: str, kind: type[MobazooError] = InputError) -> None:
    with pytest.raises(kind, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def shard(folder: Path, number: int = 0) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[number]


def edit_index(folder: Path, name: str, file: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    if file is None:
        del index["weight_map"][name]
    else:
        index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    held = {**load_file(path), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in held.items() if value is not None}, path, metadata={"format": "pt"})


def test_not_a_checkpoint_folder(tmp_path: Path) -> None:
    refused(tmp_path, "not a checkpoint folder: it has no config.json")
    refused(tmp_path / "nothing", "no such folder")


def test_config_that_is_none(single: Path) -> None:
    for text, match in (("{", "not JSON"), ("[]", "want a JSON object"), ("[" * 100_000, "not JSON")):
        (single / "config.json").write_text(text)
        refused(single, match)
    with (single / "config.json").open("w") as file:
        file.truncate(65 << 20)
    refused(single, "68157440 bytes, too large for a configuration")


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    refused(single, "no weights: neither model.safetensors nor")


def test_pickles_only(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, r"only pickled weights \(pytorch_model.bin\).*save_pretrained", UnsupportedError)


def test_both_single_and_index(sharded: Path) -> None:
    save_file({"x": torch.zeros(1)}, sharded / "model.safetensors")
    refused(sharded, "has both model.safetensors and .*remove the stale one")


def test_missing_shard(sharded: Path) -> None:
    shard(sharded).unlink()
    refused(sharded, "model-00001-of-.*missing")


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1, -1000])
def test_truncated_shard(sharded: Path, keep: int) -> None:
    path = shard(sharded)
    path.write_bytes(path.read_bytes()[:keep])
    refused(sharded, "model-00001-of-.*truncated")


def test_bytes_after_the_last_tensor(single: Path) -> None:
    with (single / "model.safetensors").open("ab") as file:
        file.write(b"xyz")
    refused(single, "3 bytes follow the last tensor")


def test_git_lfs_pointer(single: Path) -> None:
    (single / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(single, "Git LFS pointer.*git lfs pull")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ("not json", "not a safetensors file: "),
        ("[]", "not a safetensors file: "),
        ('{"a": 1}', "not a safetensors file: "),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "not a safetensors file: "),
        ('{"a": {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}}', "unknown dtype 'F3' in its header"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "sizes in its header are not whole numbers"),
        (
            '{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}',
            "sizes in its header are not whole numbers",
        ),
        (
            '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            "its header gives a bytes 0..4, want 8 bytes",
        ),
        (
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
            "its header gives a bytes 4..8, want 4 bytes",
        ),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', "its header names an entry twice"),
        ('{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', "not a safetensors file: "),
    ],
)
def test_garbage_header(tmp_path: Path, header: str, match: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 4)
    with pytest.raises(InputError, match=match):
        read_header(path)


def test_header_length_that_is_absurd(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="not a safetensors file"):
        read_header(tmp_path / "x.safetensors")


@given(data=st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(struct.pack("<Q", len(data) // 2) + data)
    with suppress(InputError):
        assert isinstance(read_header(path), dict)


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../x.safetensors", "a/../../x", "C:\\x", "..\\x", "\\\\host\\x", "", "a\0b"]
)
def test_path_that_leaves_the_folder(sharded: Path, name: str) -> None:
    edit_index(sharded, "lm_head.weight", name)
    refused(sharded, "outside the folder")


def test_link_that_leaves_the_folder(sharded: Path, tmp_path: Path) -> None:
    path = shard(sharded)
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(sharded, "a link that leaves the folder")


def test_config_link_that_leaves_the_folder(single: Path, tmp_path: Path) -> None:
    (single / "config.json").rename(tmp_path / "c.json")
    (single / "config.json").symlink_to("../c.json")
    refused(single, "a link that leaves the folder")


def test_link_inside_the_folder(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    (single / "model.safetensors").symlink_to("weights.safetensors")
    load(single)


def as_hub_cache(folder: Path, root: Path) -> Path:
    """The layout of the Hub's cache: a snapshot of links into ``blobs``."""
    snapshot, blobs = root / "models--org--name" / "snapshots" / "abc123", root / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_links_of_the_hub_cache(sharded: Path, tmp_path: Path) -> None:
    snapshot = as_hub_cache(sharded, tmp_path / "hub")
    load(snapshot)
    secret = tmp_path / "hub" / "models--other--name"
    secret.mkdir()
    path = shard(snapshot)
    real = path.resolve()
    path.unlink()
    path.symlink_to(real.rename(secret / "blob"))
    refused(snapshot, "a link that leaves the folder")


def test_blobs_beside_an_ordinary_folder_are_outside(single: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (single / "model.safetensors").rename(tmp_path / "blobs" / "0")
    (single / "model.safetensors").symlink_to("../blobs/0")
    refused(single, "a link that leaves the folder")


def test_something_that_is_no_file(single: Path) -> None:
    os.mkfifo(single / "pipe")
    with pytest.raises(InputError, match="not a regular file"):
        inside(single, "pipe")


def test_link_to_itself(single: Path) -> None:
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").symlink_to("model.safetensors")
    refused(single, "missing")


def test_index_that_disagrees(sharded: Path) -> None:
    edit_index(sharded, "lm_head.bias", shard(sharded).name)
    refused(sharded, "lm_head.bias is missing; the index says it is there")
    edit_index(sharded, "lm_head.bias", None)
    edit_index(sharded, "model.norm.weight", None)
    refused(sharded, "unexpected model.norm.weight; the index does not list it")


def test_index_that_is_none(sharded: Path) -> None:
    for text in ('{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        (sharded / INDEX).write_text(text)
        refused(sharded, "want weight_map")


def test_every_tensor_that_does_not_fit_is_named(single: Path) -> None:
    norm, bias = "model.norm.weight", "model.layers.0.mlp.up_proj.bias"
    query, key = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.self_attn.k_proj.weight"
    path = single / "model.safetensors"
    held = load_file(path)
    del held[norm]
    held |= {bias: torch.zeros(48), query: torch.zeros(2, 3), key: held[key].to(torch.int8)}
    save_file(held, path)
    with pytest.raises(CheckpointMismatchError) as caught:
        load(single)
    assert caught.value.missing == (norm,)
    assert caught.value.unexpected == (bias,)
    assert caught.value.misshaped == (f"{query} is [2, 3], want [32, 32]",)
    assert caught.value.mistyped == (f"{key} is I8",)
    for name in (norm, bias, query, key):
        assert name in str(caught.value)


def test_extra_layers(single: Path) -> None:
    edit_config(single, num_hidden_layers=2)
    refused(single, "9 unexpected: model.layers.2")
    edit_config(single, num_hidden_layers=4)
    refused(single, "9 missing: model.layers.3")
    edit_config(single, num_hidden_layers=10**12)
    refused(single, "1000000000000 layers, but there are only 30 tensors")


def test_head_that_should_be_tied(tmp_path: Path) -> None:
    save(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path / "model.safetensors", lm_head__weight=torch.zeros(97, 32))
    refused(tmp_path, "tie_word_embeddings is true but lm_head.weight differs")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported; known: llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification' is not supported"),
        ({"auto_map": {"AutoModel": "m.M"}}, "brings its own code .auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "banana", "rope_theta": 1e4}}, "rope type 'banana'"),
    ],
)
def test_unsupported(single: Path, fields: dict[str, object], match: str) -> None:
    edit_config(single, **fields)
    refused(single, match, UnsupportedError)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "wide"},
        {"hidden_size": -32},
        {"num_attention_heads": 0},
        {"num_hidden_layers": "3"},
        {"vocab_size": 10**30},
        {"hidden_size": 10**17},
        {"rope_parameters": 3},
        {"moba": []},
        {"moba": {"attention": "x"}},
        {"moba": {"attention": [{"top": 3}]}},
        {"architectures": "LlamaForCausalLM"},
        {"dtype": "int8"},
    ],
)
def test_config_values_no_model_has(single: Path, fields: dict[str, object]) -> None:
    edit_config(single, **fields)
    with pytest.raises(MobazooError) as caught:
        load(single)
    assert "\n" not in str(caught.value)


def test_sizes_no_model_can_be_made_of(single: Path) -> None:
    edit_config(single, hidden_size=10**17)
    refused(single, r"config.json describes no model: ")


def test_a_shard_that_changes_after_it_was_opened(single: Path) -> None:
    folder = open_folder(single)
    (single / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"model.safetensors: cannot read model.norm.weight: "):
        folder.read("model.norm.weight")


def test_manifest(single: Path) -> None:
    with pytest.raises(InputError, match=r"has no mobazoo.manifest.json"):
        check_manifest(single)
    write_manifest(single)
    check_manifest(single)
    load(single, check_sums=True)
    weights = bytearray((single / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (single / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=r"changed since it was written: model.safetensors"):
        load(single, check_sums=True)
    (single / MANIFEST).write_text('{"files": ["x"]}')
    with pytest.raises(InputError, match="want files, an object from file name to size and sha256"):
        check_manifest(single)
    (single / MANIFEST).write_text('{"files": {"../x": {}}}')
    with pytest.raises(InputError, match="outside the folder"):
        check_manifest(single)


def test_open_folder_reads_no_tensor(sharded: Path) -> None:
    folder = open_folder(sharded)
    assert folder.nbytes == sum(tensor.nbytes for tensor in folder.tensors.values()) == 117888
    assert len(folder.tensors) == 30
