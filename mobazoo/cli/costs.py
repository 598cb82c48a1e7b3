"""What ``mobazoo explain`` says: counted from a configuration, predicted and measured by attention alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mobazoo.attention.pattern import Full, MoBA, Pattern
from mobazoo.checkpoint.ready import usable
from mobazoo.cli.describe import config_of, dtype_of
from mobazoo.cli.output import count, note, size
from mobazoo.config.explain import ExplainRecipe
from mobazoo.config.rules import LayerAttention, join_rules, parse_rules, resolve
from mobazoo.cost import Rates, Shape, calibrate, calibration, flops, layer_patterns, measure, traffic
from mobazoo.explain import kv_bytes, share_read

HEADER = ("what", "full", "MoBA", "full / MoBA")
Row = tuple[str, str, str, str]


@dataclass(frozen=True)
class Explained:
    """Rows of the table, remarks after it, and a warning where the rules will be slower than full attention."""

    rows: list[Row]
    remarks: list[str]
    warning: str | None


def explain(recipe: ExplainRecipe) -> Explained:
    """Costs of all layers' attention in a prefill, and of the cache.

    Raises:
        InputError: no such model, or a device that is not here.
    """
    recipe.check()
    config = config_of(recipe.model)
    own = [rule.as_dict() for rule in config.attention_rules()]
    layers = resolve(parse_rules(join_rules(own, recipe.attention)), config.num_hidden_layers)
    shape = Shape(
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        dtype_of(recipe.dtype),
        torch.device(usable(recipe.device, "explain.device")).type,
    )
    length, full = recipe.length, [LayerAttention()] * len(layers)
    cache = kv_bytes(len(layers), shape.key_heads, shape.head_dim, shape.dtype) * length
    rows = [
        (
            "keys read",
            "100 %",
            f"{float(100 * share_read(layers, length)):.3g} %",
            f"{float(1 / share_read(layers, length)):.2f}",
        ),
        _row("attention FLOPs", *(sum(flops(one.pattern, length, shape) for one in some) for some in (full, layers))),
        _row(
            "bytes moved, at least",
            *(sum(traffic(one.pattern, length, shape) for one in some) for some in (full, layers)),
        ),
        ("KV cache", size(cache), size(cache), "1.00"),
    ]
    patterns = layer_patterns(layers)
    sparse = [pattern for pattern in patterns if isinstance(pattern, MoBA)]
    if not sparse:
        return Explained(rows, ["no layer has MoBA; add rules: attention='[{pattern: moba, ...}]'"], None)
    rates: dict[Pattern, Rates] = {}
    for pattern in sparse:
        note(f"timing attention of {calibration(pattern)} tokens, full and by blocks of {pattern.block_size} ...")
        rates[pattern] = calibrate(pattern, shape, recipe.rounds)
    dense = sum(one.full for one in rates.values()) / len(rates)
    rates[Full()] = Rates(dense, dense)
    base = len(layers) * rates[Full()].seconds(Full(), length)
    took = sum(number * rates[pattern].seconds(pattern, length) for pattern, number in patterns.items())
    rows.append(_seconds("predicted seconds", base, took))
    if recipe.measure:
        times = dict(zip([Full(), *sparse], measure([Full(), *sparse], length, shape, recipe.rounds), strict=True))
        base, took = len(layers) * times[Full()], sum(number * times[pattern] for pattern, number in patterns.items())
        rows.append(_seconds("measured seconds", base, took))
    remarks = [_break_even(pattern, rates[pattern]) for pattern in sparse]
    if named := sorted({layer.backend for layer in layers if isinstance(layer.pattern, MoBA)} - {"auto"}):
        remarks.append(f"timed with backend auto; the rules name {', '.join(named)}, which `mobazoo bench` times")
    warning = None
    if took > base:
        how = "measured" if recipe.measure else "predicted"
        warning = f"slower than full attention at {length} tokens ({how}: {took / base:.2f} times its time)"
    return Explained(rows, remarks, warning)


def _break_even(pattern: MoBA, rates: Rates) -> str:
    said = f"block {pattern.block_size}, top {pattern.top_k}"
    length = rates.break_even(pattern)
    return f"{said}: faster than full attention from about {length} tokens on" if length else f"{said}: never faster"


def _row(what: str, full: int, moba: int) -> Row:
    show = size if what.startswith("bytes") else count
    return what, show(full), show(moba), f"{full / moba:.2f}"


def _seconds(what: str, full: float, moba: float) -> Row:
    return what, f"{full:.3g}", f"{moba:.3g}", f"{full / moba:.2f}"
