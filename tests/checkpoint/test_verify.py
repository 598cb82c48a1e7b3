"""``verify`` catches what is not as it was, whatever it is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mobazoo.checkpoint import verify as module
from mobazoo.checkpoint.convert import convert
from mobazoo.checkpoint.memory import available_memory
from mobazoo.checkpoint.verify import VerificationError, verify
from mobazoo.config.convert import ConvertRecipe, RopeExtension
from mobazoo.errors import InputError

from .factories import RULES, edit_config, listing, save


@pytest.fixture
def zoo(single: Path, tmp_path: Path) -> Path:
    convert(ConvertRecipe(str(single), str(tmp_path / "zoo"), attention=RULES, dtype="bfloat16", verify=False))
    return tmp_path / "zoo"


def change(folder: Path, name: str, edit: object) -> None:
    held = load_file(folder / "model.safetensors")
    held[name] = edit(held[name])
    (folder / "model.safetensors").unlink()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def flip(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.uint8).view(-1)[0] ^= 1
    return tensor


def test_good(single: Path, zoo: Path) -> None:
    report = verify(single, zoo)
    assert (report.equal, report.cast, report.added, report.dropped) == (0, 30, 0, 0)
    assert (report.logits.tokens, report.logits.moba_tokens) == (64, 8)
    assert 0 <= report.logits.difference < report.logits.budget < 1e-4


def test_one_bit(single: Path, zoo: Path) -> None:
    change(zoo, "model.layers.1.mlp.up_proj.weight", flip)
    change(zoo, "model.norm.weight", lambda norm: norm + 1)
    with pytest.raises(VerificationError, match="verification failed: ") as caught:
        verify(single, zoo)
    assert caught.value.problems == ("model.layers.1.mlp.up_proj.weight differs", "model.norm.weight differs")


def test_zero_with_another_sign(single: Path, tmp_path: Path) -> None:
    change(single, "model.norm.weight", torch.zeros_like)
    convert(ConvertRecipe(str(single), str(tmp_path / "zoo")))
    change(tmp_path / "zoo", "model.norm.weight", torch.neg)
    with pytest.raises(VerificationError, match=r"model.norm.weight differs"):
        verify(single, tmp_path / "zoo")


def test_missing_and_unexpected(single: Path, zoo: Path) -> None:
    from mobazoo.checkpoint.folder import open_folder
    from mobazoo.checkpoint.verify import _compare_tensors

    change(zoo, "model.norm.weight", lambda norm: norm)
    held = load_file(zoo / "model.safetensors")
    held["model.norm.bias"] = held.pop("model.norm.weight")
    save_file(held, zoo / "model.safetensors")
    _, problems = _compare_tensors(open_folder(single), open_folder(zoo), None)
    assert problems == ["model.norm.weight is missing", "model.norm.bias is unexpected"]
    with pytest.raises(InputError, match=r"1 missing: model.norm.weight; 1 unexpected: model.norm.bias"):
        verify(single, zoo)


def test_configuration(single: Path, zoo: Path) -> None:
    edit_config(zoo, rms_norm_eps=1e-3)
    with pytest.raises(VerificationError, match=r"config.json: rms_norm_eps changed"):
        verify(single, zoo)


def test_logits(single: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "other_changes", lambda *_: [])
    edit_config(zoo, rms_norm_eps=1e-3)
    with pytest.raises(VerificationError, match=r"logits differ from transformers' by .* float32 rounding allows"):
        verify(single, zoo)


def test_frequencies(single: Path, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mobazoo.nn.rope import RotaryEmbedding

    ours = RotaryEmbedding.__init__

    def off(self: RotaryEmbedding, config: object) -> None:
        ours(self, config)
        self.inv_freq = self.inv_freq * 1.0001

    monkeypatch.setattr(RotaryEmbedding, "__init__", off)
    with pytest.raises(VerificationError, match="rotary frequencies differ from transformers'"):
        verify(single, zoo)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_frequencies_of_a_context_that_only_the_zoo_can_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    scaling = {"factor": 2.0, "rope_theta": 1e4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    save(tmp_path / "hf", rope_parameters={"rope_type": "llama3", "original_max_position_embeddings": 64, **scaling})
    convert(ConvertRecipe(str(tmp_path / "hf"), str(tmp_path / "zoo"), rope=RopeExtension(kind, factor=4.0)))
    monkeypatch.setattr("mobazoo.nn.rope.rope_steps", lambda _: ())  # a model that forgets what its config says
    with pytest.raises(VerificationError, match="rotary frequencies differ from transformers'"):
        verify(tmp_path / "hf", tmp_path / "zoo")


def test_another_family(single: Path, tmp_path: Path) -> None:
    save(tmp_path / "qwen", "qwen3")
    with pytest.raises(VerificationError, match="is a qwen3, its source llama"):
        verify(single, tmp_path / "qwen")


def test_short_memory_is_said_before_anything_is_written(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 1000)
    written: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr("mobazoo.checkpoint.convert.write_shards", lambda *args: written.append(args))
        with pytest.raises(InputError, match="bytes of memory, 1,000 are available"):
            convert(ConvertRecipe(str(single), str(tmp_path / "zoo")))
    assert written == []
    with pytest.raises(InputError, match=r"needs 268,559,616 bytes of memory, 1,000 are available; .*verify=false"):
        convert(ConvertRecipe(str(single), str(tmp_path / "zoo")))
    assert [path.name for path in tmp_path.iterdir()] == ["single"]
    convert(ConvertRecipe(str(single), str(tmp_path / "zoo"), verify=False))


def test_memory_is_known_here() -> None:
    free = available_memory()
    assert free is None or free > 1 << 20


def test_a_conversion_that_fails_leaves_the_old_folder(
    single: Path, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(zoo)
    monkeypatch.setattr("mobazoo.checkpoint.write.cast", lambda tensor, dtype, _: tensor.to(dtype) + 1)
    with pytest.raises(VerificationError, match="and 26 more"):
        convert(ConvertRecipe(str(single), str(zoo), dtype="bfloat16", overwrite=True))
    assert listing(zoo) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["single", "zoo"]
