"""Logits of a converted model against transformers' own, both in float32 with weights streamed from their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mobazoo.attention.pattern import MoBA
from mobazoo.checkpoint.compare import FLOATS
from mobazoo.checkpoint.edit import to_hf, with_context_of, without_steps
from mobazoo.checkpoint.family import Family, build_config, is_zoo, skeleton, zoo_config
from mobazoo.checkpoint.folder import Folder
from mobazoo.checkpoint.plan import KCONV
from mobazoo.checkpoint.stream import stream
from mobazoo.config.rope import rope_steps
from mobazoo.config.rules import LayerAttention
from mobazoo.nn.rope import extend

TOKENS = 64
_FULL: Mapping[str, Any] = {"layers": ":", "pattern": "full", "backend": "auto"}
_FREQUENCIES = "model.rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class LogitsReport:
    """What a comparison of logits found.

    Attributes:
        tokens: length of the row they were computed for.
        difference: largest difference with full attention.
        moba_tokens: length of the row with the rules, short enough for every layer to read it whole (None: no MoBA).
        moba_difference: largest difference there.
        budget: what float32 rounding allows.
        problems: what does not hold; empty when all is well.
    """

    tokens: int
    difference: float
    moba_tokens: int | None
    moba_difference: float | None
    budget: float
    problems: tuple[str, ...]


@torch.no_grad()
def compare_logits(source: Folder, dest: Folder, family: Family) -> LogitsReport:
    """Computes a row of random tokens three times: transformers, ours with full attention, ours with the rules.

    The plain folder runs in transformers' class and the zoo folder in ours, whichever was converted to the other; both
    with the context of ``dest`` and weights rounded to its dtypes. Where a key convolution has learned something,
    transformers has no such model, and ours with full attention stands in.
    """

    def model(folder: Folder, config: Mapping[str, Any], rules: Sequence[Mapping[str, Any]] | None) -> PreTrainedModel:
        made = _skeleton(family, config, rules, folder)
        return stream(made, folder, lambda name: _stored(name, dest, source))

    context = with_context_of(source.config, dest.config)
    if not is_zoo(dest.config):
        reference, ours = model(dest, dest.config, None), model(source, context, [_FULL])
    else:
        learned = any(name.endswith(KCONV) and bool(source.read(name).any()) for name in source.tensors)
        plain = to_hf(without_steps(context), family, source.path)
        reference = model(source, context if learned else plain, [_FULL] if learned else None)
        if not learned:
            _extend(reference, dest)
        ours = model(dest, dest.config, [_FULL])
    problems = []
    if not torch.allclose(ours.get_buffer(_FREQUENCIES), reference.get_buffer(_FREQUENCIES), rtol=1e-5, atol=0.0):
        problems.append("rotary frequencies differ from transformers'")
    ids = _tokens(ours.config)
    want = _logits(reference, ids)
    budget = _budget(ours.config, want)
    difference = _difference(_logits(ours, ids), want)
    if not difference <= budget:
        problems.append(f"logits differ from transformers' by {difference:.3g}, float32 rounding allows {budget:.3g}")
    whole, moba_difference = None, None
    if is_zoo(dest.config):
        sparse = model(dest, dest.config, [])
        whole = _whole(sparse.config.attention_layers(), ids.shape[1])
        if whole is not None:
            moba_difference = _difference(_logits(sparse, ids[:, :whole]), want[:, :whole])
            if not moba_difference <= budget:
                problems.append(
                    f"MoBA that reads all {whole} tokens differs from full attention by {moba_difference:.3g}"
                )
    return LogitsReport(ids.shape[1], difference, whole, moba_difference, budget, tuple(problems))


def _skeleton(
    family: Family, config: Mapping[str, Any], rules: Sequence[Mapping[str, Any]] | None, folder: Folder
) -> PreTrainedModel:
    """Ours with ``rules`` after the configuration's own, or transformers' where they are None."""
    if rules is not None:
        return skeleton(family.model, zoo_config(family, config, rules, folder.path), folder.path)
    config_class, model_class = family.stock
    plain = build_config(config_class, config, folder.path)
    plain._attn_implementation = "eager"
    return skeleton(model_class, plain, folder.path)


def _extend(reference: PreTrainedModel, dest: Folder) -> None:
    """Gives transformers' model the frequencies of a context it cannot be asked for, from its own ones."""
    rotary: Any = reference.get_submodule("model.rotary_emb")
    steps = rope_steps(dest.config.get("moba"))
    frequencies, rotary.attention_scaling = extend(rotary.inv_freq, rotary.attention_scaling, steps)
    rotary.inv_freq.copy_(frequencies)


def _stored(name: str, dest: Folder, source: Folder) -> torch.dtype:
    info = dest.tensors[name] if name in dest.tensors else source.tensors[name]
    return getattr(torch, FLOATS[info.dtype])


def _tokens(config: PreTrainedConfig) -> Tensor:
    length = min(TOKENS, config.max_position_embeddings)
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _budget(config: PreTrainedConfig, logits: Tensor) -> float:
    """Rounding of two float32 computations: ``sqrt(n) eps`` a dot product of length n, summed over layers and head.

    The probabilistic bound of Higham and Mary (2019), with four products in a layer, each path's own error, and the
    largest logit as the scale.
    """
    eps = torch.finfo(torch.float32).eps
    longest = max(config.hidden_size, config.intermediate_size)
    return 2 * 4 * (config.num_hidden_layers + 1) * longest**0.5 * eps * float(logits.abs().max())


def _whole(layers: Sequence[LayerAttention], length: int) -> int | None:
    """How many tokens every MoBA layer reads whole, at most ``length``."""
    sizes = [layer.pattern.block_size * layer.pattern.top_k for layer in layers if isinstance(layer.pattern, MoBA)]
    return min(length, *sizes) if sizes else None
