"""Llama 2, 3, 3.1, 3.2 (dense), over the blocks of mobazoo.nn."""

from transformers import LlamaConfig

from mobazoo.nn.causal_lm import MobaForCausalLM
from mobazoo.nn.config import MobaConfigMixin
from mobazoo.nn.decoder import MobaModel


class MobaLlamaConfig(MobaConfigMixin, LlamaConfig):
    """A Llama config with the per-layer rules in ``moba``."""

    model_type = "moba_llama"


class MobaLlamaModel(MobaModel):
    """The decoder without a head."""

    config_class = MobaLlamaConfig

    @staticmethod
    def layer_flags(config: MobaLlamaConfig) -> dict[str, bool]:
        """Which projections have biases, and whether q and k are normalised."""
        return {
            "qkv_bias": config.attention_bias,
            "out_bias": config.attention_bias,
            "qk_norm": False,
            "mlp_bias": config.mlp_bias,
        }


class MobaLlamaForCausalLM(MobaForCausalLM):
    """The language model."""

    config_class = MobaLlamaConfig
    body = MobaLlamaModel
