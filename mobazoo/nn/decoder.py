"""The decoder that Llama and Qwen share, inside transformers' classes; a family is a config and its flags over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, arange, compiler, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from mobazoo.attention.backends import BACKENDS
from mobazoo.config.rules import LayerAttention, parse_rules, resolve
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.nn.attention import NAIVE, Attention
from mobazoo.nn.cache import MobaCache
from mobazoo.nn.geometry import Geometry, documents, past_length, prompt_part
from mobazoo.nn.kconv import KeyConv
from mobazoo.nn.mlp import SwiGLU
from mobazoo.nn.norm import RMSNorm
from mobazoo.nn.rope import RotaryEmbedding
from mobazoo.nn.rows import Rows
from mobazoo.nn.sequence import RowShare

ATTN_IMPLEMENTATIONS = ("moba", NAIVE)


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
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012  (transformers declares an instance attribute)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
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

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def _as_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, KeyConv):
            initialization.zeros_(module.weight)
        elif isinstance(module, RotaryEmbedding):
            module.reset()

    def set_attention(self, rules: Sequence[Mapping[str, Any]]) -> None:
        """Gives layers another pattern, backend or decode mode; no weight changes.

        Args:
            rules: all per-layer rules (``mobazoo.load`` puts what it is given after the checkpoint's own); ``[]`` is
                full attention everywhere.

        Raises:
            InputError: rules that do not resolve; nothing is changed.
            UnsupportedError: rules that would add or remove a key convolution, which has weights.
        """
        layers = resolve(parse_rules(rules), self.config.num_hidden_layers)
        check_backends(layers)
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
        config: PreTrainedConfig, *, attention_mask: Tensor | None, past_key_values: Cache | None = None, **_: Any
    ) -> Tensor | None:
        """The padding mask as it is: the model builds ``Segments`` from it, never a T x S mask.

        None after the prompt: the cache knows the padding, and a mask that grows would be compiled anew every step.
        """
        if isinstance(past_key_values, MobaCache) and past_key_values.decode_from is not None:
            past_prompt = attention_mask is not None and attention_mask.shape[1] > past_key_values.decode_from
            return None if past_prompt else attention_mask
        return attention_mask


def check_backends(layers: Sequence[LayerAttention]) -> None:
    """Refuses backends that do not exist.

    Raises:
        InputError: naming the layer.
    """
    for number, layer in enumerate(layers):
        if layer.backend != "auto" and layer.backend not in BACKENDS:
            raise InputError(
                f"attention: layer {number}: unknown backend {layer.backend!r}; known: auto, {', '.join(BACKENDS)}"
            )


class MobaModel(MobaPreTrainedModel):
    """Embedding, decoder layers, final norm. A family says which flags its layers have."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        config.refuse_unsupported()  # fields may have been set since it was made
        layers = config.attention_layers()
        check_backends(layers)
        flags = self.layer_flags(config)
        self.kconv = tuple(layer.kconv for layer in layers)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, n, layer, flags) for n, layer in enumerate(layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.sequence: RowShare | None = None  # set where processes share rows
        self.post_init()

    @staticmethod
    def layer_flags(config: Any) -> dict[str, bool]:
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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        max_docs: int | None = None,
        max_len: int | None = None,
        decode_from: int | None = None,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states of a batch.

        Args:
            input_ids: ``[B, T]``; whole rows also where ``sequence`` shares them (the states are then a part).
            attention_mask: ``[B, past + T]``, 0 at padding (None: no padding).
            position_ids: ``[B, T]``; without a past they restart at 0 with every packed document.
            past_key_values: cache of earlier tokens, one document a row: a ``MobaCache``, or one of transformers' that
                keeps every key, with which centroids are computed anew in every call.
            inputs_embeds: ``[B, T, hidden]`` instead of ``input_ids``.
            use_cache: whether to make a cache (None: as the config says, but not while training or for packed rows).
            output_hidden_states: also return the input of every layer and the final states.
            output_attentions: refused.
            return_dict: False returns a tuple.
            max_docs: most documents in a row, from the collator; with ``max_len`` nothing waits for the device.
            max_len: longest document.
            decode_from: slot of the first token after the prompt (None: everything is prompt).

        Raises:
            InputError: both or neither of ``input_ids`` and ``inputs_embeds``, a mask or documents that do not fit, or
                a cache that is not this model's or has no room. A call that fails leaves the cache as it was.
            UnsupportedError: ``output_attentions``, packed rows with a cache, a key convolution with another cache
                than ``MobaCache``.
        """
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise UnsupportedError("output_attentions: block attention never builds the matrix; plot Routes instead")
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise InputError("forward: pass either input_ids or inputs_embeds")
        shape = (given.shape[0], given.shape[1])
        own = slice(None)
        if self.sequence is not None:
            if use_cache or past_key_values is not None:
                raise UnsupportedError("a cache of rows that several processes share; pass use_cache=False")
            use_cache, own = False, self.sequence.part(shape[1])
        hidden = self.embed_tokens(given[:, own]) if inputs_embeds is None else given[:, own]
        self._check_cache(past_key_values, *shape)
        guarded = past_key_values if isinstance(past_key_values, MobaCache) and not compiler.is_compiling() else None
        with nullcontext() if guarded is None else guarded.whole():
            past = past_length(past_key_values)
            if isinstance(past_key_values, MobaCache):
                if decode_from is not None:
                    past_key_values.decode_from = decode_from
                decode_from = past_key_values.decode_from
            segments, packed = documents(
                shape, given.device, attention_mask, position_ids, past_key_values, past, max_docs, max_len
            )
            if self._wants_cache(use_cache, past_key_values, packed) and past_key_values is None:
                past_key_values = MobaCache(self.config)
                past_key_values.decode_from = decode_from
            if isinstance(past_key_values, MobaCache) and isinstance(past, int) and past == 0:
                rows = Rows(shape[0]) if attention_mask is None else Rows.from_mask(attention_mask[:, : shape[1]])
                past_key_values.begin(rows, past, hidden.device)
            if position_ids is None:
                position_ids = (arange(shape[1], device=hidden.device) + past)[None]
            first = past if self.sequence is None else own.start
            cos, sin = self.rotary_emb(position_ids, hidden.dtype)
            prompt = prompt_part(hidden.shape[1], first, decode_from, attention_mask, segments.length)
            geometry = Geometry(segments, first, prompt, cos, sin, self.sequence)
            wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            states = [hidden] if wanted else None
            for layer in self.layers:
                hidden = layer(hidden, geometry, past_key_values=past_key_values)
                if states is not None:
                    states.append(hidden)
            hidden = self.norm(hidden)
            if states is not None:
                states[-1] = hidden
        result = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=tuple(states) if states is not None else None,
        )
        return result if self._as_dict(return_dict) else result.to_tuple()

    def _wants_cache(self, use_cache: bool | None, cache: Cache | None, packed: bool) -> bool:
        if packed and (use_cache or cache is not None):
            raise UnsupportedError(
                "packed rows with a KV cache: a cache holds one document a row; pass use_cache=False and no "
                "past_key_values"
            )
        if use_cache is None:
            return bool(self.config.use_cache and not self.training and not packed)
        return use_cache

    def _check_cache(self, cache: Cache | None, batch: int, new: int) -> None:
        if isinstance(cache, MobaCache):
            cache.check(self.kconv, batch, new)
        elif cache is not None and any(self.kconv):
            raise UnsupportedError(
                f"kconv with a {type(cache).__name__}: only MobaCache keeps the raw keys it needs; pass one, or none"
            )
