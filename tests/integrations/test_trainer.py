"""transformers' Trainer and PEFT's LoRA on zoo models, as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

import mobazoo
from tests.models.tiny import FAMILIES, MOBA, error, ids, ours, pair

TOKENS = ids(16, 48)


def trained(model: Any, folder: Path, **options: Any) -> Trainer:
    """Four steps of two accumulated batches; rows have different numbers of labels."""
    labels = TOKENS.clone()
    for row in range(len(labels)):
        labels[row, : 2 * row] = -100
    rows = [{"input_ids": tokens, "labels": wanted} for tokens, wanted in zip(TOKENS, labels, strict=True)]
    settings = TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        **options,
    )
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    return [said["loss"] for said in trainer.state.log_history if "loss" in said]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_full_attention_it_trains_as_transformers_own_model(family: str, tmp_path: Path) -> None:
    mine, theirs = pair(family)
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    got, want = trained(mine, tmp_path / "a"), trained(theirs, tmp_path / "b")
    assert losses(got) == pytest.approx(losses(want), rel=1e-4)
    for name, tensor in theirs.state_dict().items():
        moved = (tensor - before[name]).abs().max()
        assert moved > 0
        # Adam divides by the gradient's own size, so that where it is nothing rounding alone decides.
        assert (mine.state_dict()[name] - tensor).abs().mean() <= 1e-2 * moved


def same(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    tokens = ids(2, 40)
    assert loaded.config.attention_layers() == model.config.attention_layers()
    with torch.no_grad():
        assert error(loaded(tokens).logits, model.eval()(tokens).logits) <= 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_moba_it_learns_and_what_it_saves_loads(tmp_path: Path, checkpointing: bool) -> None:
    model = ours("qwen3", MOBA, tie_word_embeddings=True)
    trainer = trained(model, tmp_path / "run", gradient_checkpointing=checkpointing)
    assert losses(trainer)[-1] < losses(trainer)[0]
    trainer.save_model(tmp_path / "model")
    same(mobazoo.load(tmp_path / "model"), model)


def test_a_lora_on_it_learns_saves_and_merges(tmp_path: Path) -> None:
    base = ours("llama", MOBA)
    base.save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch.manual_seed(0)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    trainer = trained(adapted, tmp_path / "run")
    assert losses(trainer)[-1] < losses(trainer)[0]
    kept = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): t for name, t in adapted.state_dict().items()
    }
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(mobazoo.load(tmp_path / "base"), tmp_path / "adapter").eval()
    tokens = ids(2, 40)
    with torch.no_grad():
        want = adapted.eval()(input_ids=tokens).logits
        assert error(again(input_ids=tokens).logits, want) <= 1e-6
        assert error(mobazoo.load(tmp_path / "base")(tokens).logits, want) > 1e-4
        prompt = ids(1, 20)
        greedy: Any = {"input_ids": prompt, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(again.generate(**greedy), adapted.generate(**greedy))
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = mobazoo.load(tmp_path / "merged")
    same(loaded, merged)
    with torch.no_grad():
        assert error(loaded(tokens).logits, want) <= 1e-5
