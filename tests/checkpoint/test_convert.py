"""Conversion there and back, casts, shards, longer context, key convolution; what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mobazoo.checkpoint.convert import convert, plan_convert
from mobazoo.checkpoint.load import load
from mobazoo.checkpoint.manifest import check_manifest
from mobazoo.config.convert import ConvertRecipe, RopeExtension
from mobazoo.config.rope import rope_steps
from mobazoo.errors import InputError, MobazooError, UnsupportedError
from mobazoo.nn.rope import extend

from .factories import FAMILIES, RULES, edit_config, ids, listing, save, tensors

KCONV = "model.layers.{}.self_attn.k_conv.weight"


def run(source: Path, dest: Path, **fields: object):
    return convert(ConvertRecipe(str(source), str(dest), **fields))


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_there_and_back(tmp_path: Path, family: str, tied: bool, shards: bool) -> None:
    theirs = save(tmp_path / "hf", family, shards, tie_word_embeddings=tied)
    there = run(tmp_path / "hf", tmp_path / "zoo", attention=RULES)
    back = run(tmp_path / "zoo", tmp_path / "back", to="hf")
    files = len(list((tmp_path / "hf").glob("*.safetensors")))
    for report, folder in ((there, "zoo"), (back, "back")):
        assert (report.linked, report.copied, report.written) == (files, 0, 0)
        assert report.verified is not None
        assert report.verified.equal == report.tensors == len(tensors(tmp_path / "hf"))
        check_manifest(tmp_path / folder)
        for path in (tmp_path / "hf").glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / folder / path.name).read_bytes()
    assert config(tmp_path / "back") == config(tmp_path / "hf")
    zoo = config(tmp_path / "zoo")
    assert zoo["model_type"] == f"moba_{family}"
    assert zoo["architectures"] == [f"Moba{theirs.__class__.__name__}"]
    assert zoo["moba"]["attention"] == RULES
    assert zoo["moba"]["provenance"]["source"] == "hf"
    assert set(zoo["moba"]["provenance"]["versions"]) == {"mobazoo", "torch", "transformers"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, theirs(ids()).logits)


def test_small_files_come_along_and_code_does_not(single: Path, tmp_path: Path) -> None:
    kept = ("tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE", "README.md")
    left = (
        "modeling.py",
        "pytorch_model.bin",
        "x.pt",
        "x.pth",
        "x.pkl",
        "training_args.bin",
        "x.bin.index.json",
        "LICENSE.py",
    )
    for name in (*kept, *left):
        (single / name).write_text("{}")
    run(single, tmp_path / "zoo", attention=RULES)
    names = {path.name for path in (tmp_path / "zoo").iterdir()}
    assert names >= set(kept)
    assert not names & set(left)


def test_backends_are_not_written(single: Path, tmp_path: Path) -> None:
    run(single, tmp_path / "zoo", attention=[{**RULES[0], "backend": "flash"}, {"layers": 0, "backend": "reference"}])
    assert config(tmp_path / "zoo")["moba"]["attention"] == [RULES[0]]


def test_cast(sharded: Path, tmp_path: Path) -> None:
    report = run(sharded, tmp_path / "zoo", attention=RULES, dtype="bfloat16")
    assert report.written == 7
    assert report.verified.cast == 30
    assert config(tmp_path / "zoo")["dtype"] == "bfloat16"
    before, after = tensors(sharded), tensors(tmp_path / "zoo")
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
    assert load(tmp_path / "zoo").dtype == torch.bfloat16


def test_cast_that_overflows(single: Path, tmp_path: Path) -> None:
    held = load_file(single / "model.safetensors")
    held["model.norm.weight"][3] = 1e6
    save_file(held, single / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model.norm.weight: has values that float16 cannot hold; use bfloat16"):
        run(single, tmp_path / "zoo", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["single"]


def test_reshard(single: Path, tmp_path: Path) -> None:
    report = run(single, tmp_path / "many", max_shard_size="30KB")
    assert report.written == len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert all(path.stat().st_size < 34_000 for path in (tmp_path / "many").glob("*.safetensors"))
    report = run(tmp_path / "many", tmp_path / "one", max_shard_size="1GB")
    assert report.written == 1
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    before, after = tensors(single), tensors(tmp_path / "one")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(InputError, match=r"convert.max_shard_size: "):
        run(single, tmp_path / "x", max_shard_size="big")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", [RopeExtension("linear", factor=4.0), RopeExtension("yarn", max_positions=512)])
@pytest.mark.parametrize("old", [False, True])
def test_longer_context(tmp_path: Path, family: str, rope: RopeExtension, old: bool) -> None:
    theirs = save(tmp_path / "hf", family)
    if old:
        said = config(tmp_path / "hf")
        theta = said.pop("rope_parameters")["rope_theta"]
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**said, "rope_theta": theta, "rope_scaling": None}))
    report = run(tmp_path / "hf", tmp_path / "zoo", attention=RULES, rope=rope)
    assert report.linked == 1
    run(tmp_path / "zoo", tmp_path / "back", to="hf")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert back.config.max_position_embeddings == 512
    assert (back.config.rope_parameters["rope_type"], back.config.rope_parameters["factor"]) == (rope.type, 4.0)
    if rope.type == "yarn":
        assert back.config.rope_parameters["original_max_position_embeddings"] == 128
    with torch.no_grad():
        got = load(tmp_path / "zoo", attn="full")(ids(40)).logits
        torch.testing.assert_close(got, back(ids(40)).logits, rtol=0, atol=1e-5)
        assert not torch.allclose(got, theirs(ids(40)).logits, atol=1e-4)


def test_rope_that_cannot_be_extended(single: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"convert.rope: extends 128 positions by a factor of 0.5; want a factor > 1"):
        run(single, tmp_path / "x", rope=RopeExtension("linear", max_positions=64))
    edit_config(single, rope_parameters={**YARN, "attention_factor": 1.5})
    with pytest.raises(UnsupportedError, match=r"its yarn says attention_factor=1.5, which is for the context it has"):
        run(single, tmp_path / "x", rope=RopeExtension("yarn", factor=2.0))


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(("kind", "old"), [("linear", LINEAR), ("yarn", YARN)])
@pytest.mark.parametrize("unsaid", [False, True])
def test_the_same_scaling_again_multiplies_its_factor(tmp_path: Path, kind: str, old: dict, unsaid: bool) -> None:
    """transformers can say it, so that it stays an ordinary configuration."""
    save(tmp_path / "hf", rope_parameters=old)
    if unsaid:  # the original context is then the old one, and may not become the new one
        edit_config(tmp_path / "hf", rope_parameters={k: v for k, v in old.items() if "original" not in k})
    run(tmp_path / "hf", tmp_path / "zoo", rope=RopeExtension(kind, factor=4.0))
    said = config(tmp_path / "zoo")
    assert "rope" not in said["moba"]
    want = {**old, "factor": 8.0} | ({"original_max_position_embeddings": 128} if unsaid and kind == "yarn" else {})
    assert said["rope_parameters"] == want
    assert said["max_position_embeddings"] == 512
    run(tmp_path / "zoo", tmp_path / "back", to="hf")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back")(ids(40)).logits
        torch.testing.assert_close(load(tmp_path / "zoo")(ids(40)).logits, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "kind"), [(LLAMA3, "linear"), (LLAMA3, "yarn"), (YARN, "linear"), (LINEAR, "yarn")], ids=str
)
@pytest.mark.parametrize("scaling", ["rope_parameters", "rope_scaling"])
def test_a_scaling_over_another_is_said_by_the_zoo(tmp_path: Path, old: dict, kind: str, scaling: str) -> None:
    theirs = save(tmp_path / "hf", rope_parameters=old)
    if scaling == "rope_scaling":
        said = config(tmp_path / "hf")
        del said["rope_parameters"]
        said |= {"rope_theta": 1e4, "rope_scaling": {k: v for k, v in old.items() if k != "rope_theta"}}
        (tmp_path / "hf" / "config.json").write_text(json.dumps(said))
    report = run(tmp_path / "hf", tmp_path / "zoo", attention=RULES, rope=RopeExtension(kind, factor=8.0))
    assert report.verified is not None
    said = config(tmp_path / "zoo")
    step = {"type": kind, "factor": 8.0, "original_max_position_embeddings": 128}
    assert said["moba"]["rope"] == [step]
    assert said[scaling]["rope_type"] == old["rope_type"]
    assert said["max_position_embeddings"] == 1024
    ours, rotary = load(tmp_path / "zoo", attn="full"), theirs.model.rotary_emb
    frequencies, rotary.attention_scaling = extend(rotary.inv_freq, rotary.attention_scaling, steps(step))
    assert torch.equal(ours.model.rotary_emb.inv_freq, frequencies)
    rotary.inv_freq = frequencies
    with torch.no_grad():
        torch.testing.assert_close(ours(ids(40)).logits, theirs(ids(40)).logits, rtol=0, atol=1e-5)
    for source, rope in (("zoo", None), ("hf", RopeExtension(kind, factor=8.0))):
        with pytest.raises(UnsupportedError, match=f"extended over a {old['rope_type']} rope, which a plain Hugging"):
            run(tmp_path / source, tmp_path / "x", to="hf", rope=rope)
    again = run(
        tmp_path / "zoo", tmp_path / "again", attention=[{"top_k": 3}], rope=RopeExtension("linear", factor=2.0)
    )
    assert again.verified is not None
    both = config(tmp_path / "again")["moba"]["rope"]
    assert both == [step, {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 1024}]
    longer = load(tmp_path / "again")
    assert torch.equal(longer.model.rotary_emb.inv_freq, frequencies / 2)
    longer.save_pretrained(tmp_path / "saved")
    assert config(tmp_path / "saved")["moba"]["rope"] == both


def steps(*said: dict) -> tuple:
    return rope_steps({"rope": list(said)})


def test_the_original_context_does_not_move(tmp_path: Path) -> None:
    """transformers takes the current context where the original one is not said."""
    save(tmp_path / "hf", rope_parameters=LLAMA3)
    edit_config(tmp_path / "hf", rope_parameters={k: v for k, v in LLAMA3.items() if "original" not in k})
    before = load(tmp_path / "hf").model.rotary_emb.inv_freq
    run(tmp_path / "hf", tmp_path / "zoo", rope=RopeExtension("linear", factor=4.0))
    assert config(tmp_path / "zoo")["rope_parameters"]["original_max_position_embeddings"] == 128
    assert torch.equal(load(tmp_path / "zoo").model.rotary_emb.inv_freq, before / 4)


@pytest.mark.parametrize(("limit", "want"), [(128, 512), (64, 512), (4096, 4096), (10**30, 10**30), (None, None)])
def test_a_longer_context_raises_the_tokenizers_limit(
    single: Path, tmp_path: Path, limit: object, want: object
) -> None:
    (single / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit, "x": "é"}))
    run(single, tmp_path / "same", verify=False)
    assert (tmp_path / "same" / "tokenizer_config.json").read_bytes() == (single / "tokenizer_config.json").read_bytes()
    run(single, tmp_path / "zoo", rope=RopeExtension("yarn", factor=4.0), verify=False)
    said = json.loads((tmp_path / "zoo" / "tokenizer_config.json").read_text())
    assert said == {"model_max_length": want, "x": "é"}
    check_manifest(tmp_path / "zoo")


def test_kconv_starts_as_nothing_and_goes_while_it_is_nothing(sharded: Path, tmp_path: Path) -> None:
    rules = [*RULES, {"layers": "1:", "kconv": 3}]
    report = run(sharded, tmp_path / "zoo", attention=rules)
    assert (report.linked, report.written) == (7, 1)
    assert report.added == (KCONV.format(1), KCONV.format(2))
    assert tensors(tmp_path / "zoo")[KCONV.format(1)].shape == (3, 2, 1, 8)
    with torch.no_grad():
        want = load(sharded, attention=RULES)(ids(), use_cache=False).logits
        assert torch.equal(load(tmp_path / "zoo")(ids(), use_cache=False).logits, want)
    wider = run(tmp_path / "zoo", tmp_path / "wider", attention=[{"layers": 1, "kconv": 5}, {"layers": 2, "kconv": 0}])
    assert (wider.added, wider.dropped) == ((KCONV.format(1),), (KCONV.format(1), KCONV.format(2)))
    back = run(tmp_path / "zoo", tmp_path / "back", to="hf")
    assert back.dropped == (KCONV.format(1), KCONV.format(2))
    assert (back.linked, back.written) == (7, 0)
    before, after = tensors(sharded), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_kconv_that_has_learned(single: Path, tmp_path: Path) -> None:
    run(single, tmp_path / "zoo", attention=[*RULES, {"kconv": 3}])
    (file,) = (tmp_path / "zoo").glob("model-00002-*")
    held = {name: torch.randn_like(tensor) for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(held, file, metadata={"format": "pt"})
    for fields in ({"to": "hf"}, {"attention": [{"layers": 0, "kconv": 5}]}):
        with pytest.raises(UnsupportedError, match=r"k_conv.weight is not zero, and the result has no place for it"):
            run(tmp_path / "zoo", tmp_path / "x", **fields)
    report = run(tmp_path / "zoo", tmp_path / "again", attention=[{"top_k": 3}])  # verified against the zoo's own model
    assert report.verified.equal == 33
    assert "before" in config(tmp_path / "again")["moba"]["provenance"]


def test_dest_that_exists(single: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"
    dest.mkdir()
    run(single, dest, attention=RULES, verify=False)  # an empty folder is free
    before = listing(dest)
    with pytest.raises(InputError, match="exists; pass overwrite=true to replace it"):
        run(single, dest)
    assert listing(dest) == before
    report = run(single, dest, overwrite=True, dtype="bfloat16")
    assert report.dest == dest
    assert config(dest)["moba"]["attention"] == []
    run(dest, dest, overwrite=True, attention=RULES)  # in place
    assert config(dest)["moba"]["attention"] == RULES
    (dest / "optimizer.pt").write_text("")
    with pytest.raises(InputError, match=r"holds 'optimizer.pt', so it is more than a checkpoint"):
        run(single, dest, overwrite=True)


@pytest.mark.parametrize("what", ["file", "link", "home"])
def test_dest_that_must_not_be_replaced(single: Path, tmp_path: Path, what: str) -> None:
    dest = tmp_path / "dest"
    if what == "file":
        dest.write_text("precious")
    elif what == "link":
        (tmp_path / "other").mkdir()
        dest.symlink_to("other")
    else:
        (dest / "photos").mkdir(parents=True)
    with pytest.raises(InputError, match=r"not a folder|is a link|holds 'photos'"):
        run(single, dest, overwrite=True)


def test_folders_in_one_another(single: Path) -> None:
    for dest in (single / "zoo", single.parent):
        with pytest.raises(InputError, match=r"may not lie in one another|more than a checkpoint"):
            run(single, dest, overwrite=True)


def test_dest_that_cannot_be_made(single: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run(single, tmp_path / "file" / "zoo")


def test_dry_run_writes_nothing(single: Path, tmp_path: Path) -> None:
    plan = plan_convert(ConvertRecipe(str(single), str(tmp_path / "zoo"), attention=[*RULES, {"kconv": 3}]))
    assert len(plan.added) == 3
    assert [shard.same is None for shard in plan.shards] == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["single"]


def test_disk_with_too_little_room(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match="disk full: 58,944 bytes to write, 1 free"):
        run(single, tmp_path / "zoo", dtype="bfloat16")
    run(single, tmp_path / "zoo")  # links take no room


def test_another_file_system_gets_copies(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", no_link)
    assert run(single, tmp_path / "zoo").copied == 1
    check_manifest(tmp_path / "zoo")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"to": "gguf"}, "convert.to: want one of zoo, hf, got 'gguf'"),
        ({"dtype": "int8"}, "convert.dtype: want one of float32"),
        ({"to": "hf", "attention": RULES}, "a plain Hugging Face checkpoint has no rules"),
        ({"attention": [{"topk": 1}]}, r"convert.attention\[0\]: unknown key 'topk'; did you mean 'top_k'"),
        ({"max_shard_size": 0}, "convert.max_shard_size: want bytes or a size like 5GB"),
        ({"rope": RopeExtension("ntk", 2.0)}, "convert.rope.type: want one of linear, yarn"),
        ({"rope": RopeExtension("yarn")}, "convert.rope: give either factor or max_positions"),
    ],
)
def test_recipes_that_cannot_be(fields: dict, match: str) -> None:
    with pytest.raises(MobazooError, match=match):
        convert(ConvertRecipe("nowhere", "dest", **fields))


def test_progress(sharded: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    convert(ConvertRecipe(str(sharded), str(tmp_path / "zoo")), progress=lambda *said: told.append(said))
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["write", "sums", "verify"]
    assert [(done, total) for stage, done, total in told if stage == "write"][-1] == (117888, 117888)
    assert all(done <= total for _, done, total in told)
