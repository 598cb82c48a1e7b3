"""Qwen3 (dense): q and k normalised per head before RoPE, over the blocks of mobazoo.nn."""

from transformers import Qwen3Config

from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.nn.config import MobaConfigMixin
from mobazoo.nn.decoder import MobaModel


class MobaQwen3Config(MobaConfigMixin, Qwen3Config):
    """A Qwen3 config with the per-layer rules in ``moba``."""

    model_type = "moba_qwen3"


class MobaQwen3Model(MobaModel):
    """The decoder without a head."""

    config_class = MobaQwen3Config

    @staticmethod
    def layer_flags(config: MobaQwen3Config) -> dict[str, bool]:
        """Which projections have biases, and whether q and k are normalised."""
        return {
            "qkv_bias": config.attention_bias,
            "out_bias": config.attention_bias,
            "qk_norm": True,
            "mlp_bias": False,
        }


class MobaQwen3ForCausalLM(MobaForCausalLM):
    """The language model."""

    config_class = MobaQwen3Config
    body = MobaQwen3Model
