"""What our configs add to a family's: per-layer rules, and refusal of what the models do not compute."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from mobazoo.config.rope import rope_steps
from mobazoo.config.rules import LayerAttention, Rule, moba_rules, resolve
from mobazoo.errors import UnsupportedError


class MobaConfigMixin(PreTrainedConfig):
    """The object ``moba`` with the per-layer rules.

    ``moba`` is plain JSON, ``{"attention": [rules], "rope": [steps], "provenance": {...}}``. Backends are a load-time
    choice: rules may name them in memory, ``to_dict`` and with it ``config.json`` leave them out.

    Raises:
        InputError: rules that no model of this depth could use.
        UnsupportedError: what the models would otherwise ignore: see ``refuse_unsupported``.
    """

    moba: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.refuse_unsupported()
        self.attention_layers()  # refuse rules that no model could use before there is one
        rope_steps(self.moba)

    def attention_rules(self) -> tuple[Rule, ...]:
        """The rules of ``moba.attention``."""
        return moba_rules(self.moba)

    def attention_layers(self) -> tuple[LayerAttention, ...]:
        """The attention of every layer."""
        return resolve(self.attention_rules(), self.num_hidden_layers, "moba.attention")

    def refuse_unsupported(self) -> None:
        """Refuses layers that are not full attention, attention dropout, other activations and bidirectional attention.

        Raises:
            UnsupportedError: naming the field and its value.
        """
        for number, kind in enumerate(self.layer_types if "layer_types" in self.__dict__ else ()):
            if kind != "full_attention":
                raise UnsupportedError(
                    f"layer_types[{number}] is {kind!r}: zoo models have no such layers; set use_sliding_window=false "
                    "and layer_types=null to run it as full attention"
                )
        if self.attention_dropout:
            raise UnsupportedError(f"attention_dropout={self.attention_dropout} is not supported; set it to 0")
        if self.hidden_act not in ("silu", "swish"):
            raise UnsupportedError(f"hidden_act={self.hidden_act!r} is not supported; zoo models have silu")
        if not self.__dict__.get("is_causal", True):
            raise UnsupportedError("is_causal=False is not supported; zoo models are causal")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON, without backends."""
        output: dict[str, Any] = super().to_dict()
        if output.get("moba"):
            kept = [
                {name: value for name, value in rule.as_dict().items() if name != "backend"}
                for rule in self.attention_rules()
            ]
            output["moba"] = {**output["moba"], "attention": [rule for rule in kept if rule.keys() != {"layers"}]}
        return output
