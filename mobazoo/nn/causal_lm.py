"""A language model: decoder, head, loss and ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Never

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from mobazoo.errors import InputError, MobazooError, UnsupportedError
from mobazoo.nn.cache import MobaCache
from mobazoo.nn.decoder import MobaModel, MobaPreTrainedModel
from mobazoo.nn.loss import head_loss

# What transformers calls caches, and whether ours of that kind is static.
CACHES = {"dynamic": False, "static": True, "offloaded": False}


class MobaForCausalLM(MobaPreTrainedModel, GenerationMixin):
    """A decoder with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (as in transformers)
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    # Trainer then divides the loss by the tokens of all accumulated batches, not by those of each.
    accepts_loss_kwargs: ClassVar[bool] = True
    body: ClassVar[type[MobaModel]]
    _static_length = 0

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
        loss_only: bool = False,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and the loss where ``labels`` are given (shifted by one, -100 ignored).

        Args and errors not named here are those of ``MobaModel.forward``.

        Args:
            labels: ``[B, T]``; in packed rows the first token of each document should be -100.
            logits_to_keep: last positions to compute logits of (0: all), or their indices.
            num_items_in_batch: divide the summed loss by this instead of by the labels of this batch.
            loss_only: return the loss without logits, which are never whole in memory. Where processes share rows, its
                mean over them is the rows' loss.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            max_docs=max_docs,
            max_len=max_len,
            decode_from=decode_from,
        )
        if self.model.sequence is not None and labels is not None and not loss_only:
            raise UnsupportedError("rows that several processes share: pass loss_only=True, or no labels")
        if loss_only and labels is not None:
            head: Tensor = self.lm_head.weight
            if isinstance(head, DTensor):  # split by tensor parallelism; FSDP2 has gathered it here
                head = head.full_tensor()
            if head.shape[0] != self.config.vocab_size:
                raise UnsupportedError(
                    "loss_only: tensor parallelism of this transformers does not say where the rest of the head is; "
                    "leave it out, or take 5.23"
                )
            alone = head_loss(outputs.last_hidden_state, head, labels, num_items_in_batch, self.model.sequence)
            result = CausalLMOutputWithPast(
                loss=alone, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
            )
            return result if self._as_dict(return_dict) else result.to_tuple()
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
        return result if self._as_dict(return_dict) else result.to_tuple()

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        decode_from: int | None = None,
        prefill_chunk: int | None = None,
        offload: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' ``generate``; tokens after the prompt it is given use each layer's decode pattern.

        Args:
            inputs: ``[B, T]`` prompt, as ``input_ids``.
            *args: see transformers.
            decode_from: slot of the first token that counts as decoded (None: the end of the prompt).
            prefill_chunk: tokens of the prompt to read at a time (None: all), which bounds the memory of activations;
                the result is the same. transformers calls it ``prefill_chunk_size``.
            offload: where the cache keeps keys and values, see ``MobaCache``.
            **kwargs: see transformers. ``cache_implementation`` may be ``dynamic`` (the default), ``static`` or
                ``offloaded``, which is ``offload="host"``.

        Raises:
            InputError: a chunk below 1, ``offload`` together with a cache that is given, or a cache with as many tokens
                as the prompt or without room for what may be written; it is left as it was.
            UnsupportedError: another ``cache_implementation``, or ``assistant_early_exit``.
        """
        config = kwargs.get("generation_config") or self.generation_config
        _check_kind(kwargs.get("cache_implementation") or config.cache_implementation)
        if kwargs.get("assistant_early_exit") or config.assistant_early_exit:
            raise UnsupportedError(
                "assistant_early_exit: rules count a whole model's layers; pass an assistant_model, or "
                "prompt_lookup_num_tokens"
            )
        if prefill_chunk is not None:
            kwargs["prefill_chunk_size"] = prefill_chunk
        chunk = kwargs.get("prefill_chunk_size", config.prefill_chunk_size)
        if chunk is not None and chunk < 1:
            raise InputError(f"prefill_chunk: want at least 1 token, got {chunk}")
        if offload is not None and (kwargs.get("past_key_values") is not None or kwargs.get("use_cache") is False):
            raise InputError("offload: says where generate makes its cache; leave out past_key_values and use_cache")
        prompt = inputs if inputs is not None else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        mask, kept = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        # A second turn on a full cache may bring its new tokens only; the mask then has all.
        end = max(1 if prompt is None else prompt.shape[1], 0 if mask is None else mask.shape[1])
        if isinstance(kept, MobaCache) and end <= kept.get_seq_length():
            raise InputError(
                f"past_key_values: holds {kept.get_seq_length()} tokens, the prompt and its mask end at {end}; "
                "pass all tokens so far, or the new ones and the mask of all"
            )
        decode_from = end if decode_from is None else decode_from
        if offload is not None:
            kwargs["past_key_values"] = MobaCache(self.config, offload=offload)
        given = kept if isinstance(kept, MobaCache) else None
        before = None if given is None else (given.get_seq_length(), given.decode_from)
        try:
            return super().generate(inputs, *args, decode_from=decode_from, **kwargs)  # type: ignore[misc]
        except (MobazooError, ValueError):
            if given is not None and before is not None and given.get_seq_length() == before[0]:
                given.decode_from = before[1]  # refused before anything was read
            raise

    def _prefill(self, input_ids: Any, generation_config: GenerationConfig, *args: Any, **options: Any) -> Any:
        """Called by transformers' ``generate``. A prompt's chunks are read outside of compiled graphs: a cache gets its
        memory with the first tokens, and a last chunk of one token is prompt too.
        """
        asked, generation_config.disable_compile = generation_config.disable_compile, True
        try:
            return super()._prefill(input_ids, generation_config, *args, **options)  # type: ignore[misc]
        finally:
            generation_config.disable_compile = asked

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Makes a ``MobaCache``; called by transformers' ``generate``. The cache then knows where the prompt ends."""
        kind = generation_config.cache_implementation
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        else:
            _check_kind(kind)
            length = None
            if CACHES.get(kind, False):
                asked = getattr(generation_config, "max_cache_len", None) or 0
                # One length over calls, so that a compiled step is not compiled again.
                length = max(max_cache_length, asked, self._static_length)
                self._static_length = length
            offload = "host" if kind == "offloaded" else None
            model_kwargs["past_key_values"] = MobaCache(self.config, length, offload)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, MobaCache):
            if cache.max_length is not None and max_cache_length > cache.max_length:
                raise InputError(
                    f"past_key_values: the prompt and what may be written after it take {max_cache_length} slots, the "
                    f"static cache has {cache.max_length}; make it longer or max_new_tokens smaller"
                )
            cache.decode_from = model_kwargs.pop("decode_from", None)

    def generate_batch(self, *_: Any, **__: Any) -> Never:
        """Refused: continuous batching would run other attention than the rules say."""
        raise UnsupportedError("generate_batch: continuous batching does not know MoBA; use generate")

    def init_continuous_batching(self, *_: Any, **__: Any) -> Never:
        """Refused, as ``generate_batch``."""
        self.generate_batch()


def _check_kind(kind: str | None) -> None:
    # transformers asks for dynamic_full where it would need a cache that keeps every key: ours always does.
    if kind not in (None, "dynamic_full", *CACHES):
        raise UnsupportedError(f"cache_implementation={kind!r}: zoo models know {', '.join(CACHES)}; take one of them")
