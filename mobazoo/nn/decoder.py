"""The decoder that Llama and Qwen share, inside transformers' classes; a family is a config and three flags over it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from mobazoo.attention import Segments
from mobazoo.config.rules import LayerAttention, Rule, parse_rules, resolve
from mobazoo.errors import UnsupportedError
from mobazoo.nn.attention import Attention, Geometry
from mobazoo.nn.mlp import SwiGLU
from mobazoo.nn.norm import RMSNorm
from mobazoo.nn.rope import RotaryEmbedding

ATTN_IMPLEMENTATIONS = ("moba", "moba_naive")


class MobaConfigMixin(PreTrainedConfig):
    """What our configs add to a family's: the object ``moba`` with the per-layer rules.

    ``moba`` is plain JSON, ``{"attention": [rules], ...}``. Backends are a load-time choice: rules may name them in
    memory, ``to_dict`` and with it ``config.json`` leave them out.
    """

    moba: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if "sliding_attention" in (getattr(self, "layer_types", None) or ()):
            first = self.layer_types.index("sliding_attention")
            raise UnsupportedError(
                f"layer {first} is a sliding-window layer; set use_sliding_window=false to run it as full attention"
            )
        self.attention_layers()  # refuse rules that no model could use before there is one

    def attention_rules(self) -> tuple[Rule, ...]:
        """The rules of ``moba.attention``."""
        return parse_rules((self.moba or {}).get("attention"), "moba.attention")

    def attention_layers(self) -> tuple[LayerAttention, ...]:
        """The attention of every layer."""
        return resolve(self.attention_rules(), self.num_hidden_layers, "moba.attention")

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


class DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each after a norm and added to the stream."""

    def __init__(self, config: PreTrainedConfig, number: int, layer: LayerAttention, flags: dict[str, bool]) -> None:
        super().__init__()
        mlp_bias = flags["mlp_bias"]
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(
            config, number, layer, **{name: flag for name, flag in flags.items() if name != "mlp_bias"}
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, mlp_bias)

    def forward(self, x: Tensor, geometry: Geometry, past_key_values: Cache | None = None) -> Tensor:
        """``[B, T, hidden]`` in and out."""
        x = x + self.self_attn(self.input_layernorm(x), geometry, past_key_values)
        return x + self.mlp(self.post_attention_layernorm(x))


class MobaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of our models."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, allow_all_kernels: bool = False
    ) -> str:
        name = attn_implementation or "moba"
        if name not in ATTN_IMPLEMENTATIONS:
            raise UnsupportedError(
                f"attn_implementation={name!r}: zoo models take {' or '.join(map(repr, ATTN_IMPLEMENTATIONS))}; "
                "choose full or MoBA attention and its backend per layer by rules (model.set_attention)"
            )
        return name

    def set_attention(self, rules: list[dict[str, Any]]) -> None:
        """Gives layers another pattern, backend or decode mode; no weight changes.

        Raises:
            InputError: rules that do not resolve.
            UnsupportedError: rules that would add or remove a key convolution, which has weights.
        """
        layers = resolve(parse_rules(rules), self.config.num_hidden_layers)
        attentions = [module for module in self.modules() if isinstance(module, Attention)]
        for module in attentions:
            if layers[module.number].kconv != module.layer.kconv:
                raise UnsupportedError(
                    f"set_attention: layer {module.number} has kconv {module.layer.kconv}, "
                    f"the rules say {layers[module.number].kconv}; its weights come by conversion"
                )
        for module in attentions:
            module.layer = layers[module.number]
        self.config.moba = {**(self.config.moba or {}), "attention": [dict(rule) for rule in rules]}

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig, *, attention_mask: Tensor | None, **_: Any
    ) -> Tensor | None:
        """The padding mask as it is: the model builds ``Segments`` from it, never a T x S mask."""
        return attention_mask


class MobaModel(MobaPreTrainedModel):
    """Embedding, decoder layers, final norm. A family says which flags its layers have."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DecoderLayer(config, number, layer, self.layer_flags(config))
            for number, layer in enumerate(config.attention_layers())
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @staticmethod
    def layer_flags(config: PreTrainedConfig) -> dict[str, bool]:
        """``qkv_bias``, ``out_bias``, ``qk_norm`` and ``mlp_bias`` of the family."""
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        max_docs: int | None = None,
        max_len: int | None = None,
        decode_from: int | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states of a batch.

        Args:
            input_ids: ``[B, T]``.
            attention_mask: ``[B, past + T]``, 0 at padding (None: no padding).
            position_ids: ``[B, T]``; without a past they restart at 0 with every packed document.
            past_key_values: cache of earlier tokens.
            inputs_embeds: ``[B, T, hidden]`` instead of ``input_ids``.
            use_cache: whether to make a cache (None: as the config says, never while training).
            output_hidden_states: also return the input of every layer and the final states.
            max_docs: most documents in a row, from the collator; with ``max_len`` nothing waits for the device.
            max_len: longest document.
            decode_from: slot of the first token after the prompt (None: everything is prompt).
        """
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        geometry = self._geometry(hidden, attention_mask, position_ids, past_key_values, max_docs, max_len, decode_from)
        states = [hidden] if output_hidden_states else None
        for layer in self.layers:
            hidden = layer(hidden, geometry, past_key_values=past_key_values)
            if states is not None:
                states.append(hidden)
        hidden = self.norm(hidden)
        if states is not None:
            states[-1] = hidden
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if states is not None else None,
        )

    def _geometry(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        max_docs: int | None,
        max_len: int | None,
        decode_from: int | None,
    ) -> Geometry:
        batch, length = hidden.shape[:2]
        past: int | Tensor = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, Tensor):
            past = past.clone()  # a static cache counts on in place
        slots = length if cache is None else cache.get_mask_sizes(length, 0)[0]
        if slots == length and position_ids is not None:
            ids = position_ids.expand(batch, length)
            segments = Segments.from_position_ids(ids, attention_mask, max_docs, max_len)
        elif attention_mask is not None:
            # Slots a static cache has not written belong to the open document: causality hides them.
            mask = nn.functional.pad(attention_mask, (0, slots - attention_mask.shape[1]), value=1)
            segments = Segments.from_attention_mask(mask)
        else:
            segments = Segments.single(batch, slots, hidden.device)
        if position_ids is None:
            position_ids = (torch.arange(length, device=hidden.device) + past)[None]
        cos, sin = self.rotary_emb(position_ids, hidden.dtype)
        return Geometry(segments, past, decode_from, cos, sin)


class MobaForCausalLM(MobaPreTrainedModel, GenerationMixin):
    """A decoder with a language-model head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    body: ClassVar[type[MobaModel]]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = self.body(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        max_docs: int | None = None,
        max_len: int | None = None,
        decode_from: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where ``labels`` are given (shifted by one, -100 ignored). See ``MobaModel.forward``.

        Raises:
            UnsupportedError: ``output_attentions``; there is no attention matrix to return.
        """
        if output_attentions:
            raise UnsupportedError("output_attentions: block attention never builds the matrix; plot Routes instead")
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states=bool(output_hidden_states),
            max_docs=max_docs,
            max_len=max_len,
            decode_from=decode_from,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.vocab_size, num_items_in_batch=num_items_in_batch
            )
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        return result if return_dict is not False else result.to_tuple()

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' ``generate``; tokens after the prompt it is given use each layer's decode pattern."""
        prompt = inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        length = 1 if prompt is None else prompt.shape[1]
        return super().generate(inputs, decode_from=length, **kwargs)

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Refused: continuous batching would run other attention than the rules say."""
        raise UnsupportedError("generate_batch: continuous batching does not know MoBA; use generate")
