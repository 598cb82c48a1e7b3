"""Tiny random models: ours and transformers' with the same weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from mobazoo.zoo import family_class

FAMILIES = ("llama", "qwen2", "qwen3")
STOCK = {
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "mistral": transformers.MistralForCausalLM,
}
VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MOBA = [{"pattern": "moba", "block_size": 8, "top_k": 2}]


def sizes(family: str) -> dict[str, Any]:
    """Fields of a tiny config; head_dim is not hidden / heads where the family can say so."""
    return (
        SIZES
        | ({} if family == "qwen2" else {"head_dim": 16})
        | ({"sliding_window": None} if family == "mistral" else {})
    )


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights large enough for sharp attention; biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 if parameter.dim() > 1 else 0.3 * noise + (parameter == 1))


def ours(
    family: str,
    rules: list[dict[str, Any]] | None = None,
    seed: int = 0,
    rope: list[dict[str, Any]] | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """A zoo model with random weights, in eval mode; ``rules=None`` is full attention, ``rope`` extends its context."""
    moba = {"attention": rules or []} | ({"rope": rope} if rope else {})
    config = family_class(family, "Config")(**(sizes(family) | fields), moba=moba)
    model = family_class(family, "ForCausalLM")(config)
    randomise(model, seed)
    return model.eval()


def stock(
    family: str, attn: str, rules: list[dict[str, Any]] | None = None, seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """transformers' model of the family, with rules in its config if given."""
    config = STOCK[family].config_class(**(sizes(family) | fields))
    if rules is not None:
        config.moba = {"attention": rules}
    model = STOCK[family]._from_config(config, attn_implementation=attn)
    randomise(model, seed)
    return model.eval()


def pair(
    family: str, rules: list[dict[str, Any]] | None = None, seed: int = 0, attn: str = "eager", **fields: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Ours and transformers' with the same weights."""
    mine, theirs = ours(family, rules, seed, **fields), stock(family, attn, seed=seed, **fields)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random tokens, none of them padding."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value, or to 1."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1.0))


def padded(rows: Tensor, lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    """The last ``lengths`` tokens of each row with padding on one side, and the mask."""
    width = rows.shape[1]
    mask = torch.zeros_like(rows)
    out = torch.zeros_like(rows)
    for b, n in enumerate(lengths):
        where = slice(width - n, width) if side == "left" else slice(0, n)
        out[b, where], mask[b, where] = rows[b, width - n :], 1
    return out, mask
