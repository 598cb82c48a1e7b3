"""Tiny random checkpoints, written by transformers' own save_pretrained."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FAMILIES = tuple(CLASSES)
RULES = [{"layers": ":", "pattern": "moba", "block_size": 4, "top_k": 2}, {"layers": -1, "pattern": "full"}]


def tiny(family: str = "llama", **fields: object) -> PreTrainedModel:
    config, model = CLASSES[family]
    extra = {"head_dim": 8} if family == "qwen3" else {}
    torch.manual_seed(0)
    made = model(config(**{**SIZES, **extra, **fields})).eval()
    with torch.no_grad():  # norms and biases start as ones and zeros, which hides swaps
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def save(folder: Path, family: str = "llama", shards: bool = False, **fields: object) -> PreTrainedModel:
    model = tiny(family, **fields)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    return model


def ids(length: int = 24, rows: int = 2) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(1))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def edit_config(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def listing(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
