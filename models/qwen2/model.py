"""Qwen2 and Qwen2.5 (dense): biases on q, k and v, over the blocks of mobazoo.nn."""

from typing import Any

from transformers import Qwen2Config

from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.nn.config import MobaConfigMixin
from mobazoo.nn.decoder import MobaModel


class MobaQwen2Config(MobaConfigMixin, Qwen2Config):
    """A Qwen2 config with the per-layer rules in ``moba``."""

    model_type = "moba_qwen2"
    head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class MobaQwen2Model(MobaModel):
    """The decoder without a head."""

    config_class = MobaQwen2Config

    @staticmethod
    def layer_flags(config: MobaQwen2Config) -> dict[str, bool]:
        """Which projections have biases, and whether q and k are normalised."""
        return {"qkv_bias": True, "out_bias": False, "qk_norm": False, "mlp_bias": False}


class MobaQwen2ForCausalLM(MobaForCausalLM):
    """The language model."""

    config_class = MobaQwen2Config
    body = MobaQwen2Model
