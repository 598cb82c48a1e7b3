"""Which attention each layer uses: an ordered list of rules, later ones override only the fields they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mobazoo.attention.pattern import Full, MoBA, Pattern
from mobazoo.config.keys import refuse_unknown
from mobazoo.errors import InputError

PATTERNS = ("full", "moba")
DECODES = ("full", "moba")
KCONV_WIDTHS = (3, 5)
# What the object ``moba`` of a checkpoint's config.json may hold.
MOBA_KEYS = ("attention", "rope", "provenance")


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of ``attention:`` in a recipe or checkpoint; ``None`` leaves what earlier rules said.

    Attributes:
        layers: a layer number (negative counts from the end) or a Python slice such as ``":"``, ``"-3:"``, ``"::2"``.
        pattern: ``full`` or ``moba``.
        block_size: tokens in a block, for ``moba``.
        top_k: blocks a query reads, its own included, for ``moba``.
        backend: ``auto`` or a backend by name.
        decode: what queries after the prompt use, ``full`` (the paper's choice) or ``moba``.
        kconv: width of the key convolution, 3 or 5; 0 is none.
    """

    layers: int | str = ":"
    pattern: str | None = None
    block_size: int | None = None
    top_k: int | None = None
    backend: str | None = None
    decode: str | None = None
    kconv: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that say something, as plain JSON."""
        return {name: value for name in RULE_KEYS if (value := getattr(self, name)) is not None}


# Read once: torch.compile traces what reads rules, and cannot trace `fields` and `asdict`.
RULE_KEYS = tuple(field.name for field in fields(Rule))


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What the rules come to for one layer."""

    pattern: Pattern = Full()
    backend: str = "auto"
    decode: str = "full"
    kconv: int = 0

    @property
    def decode_pattern(self) -> Pattern:
        """The pattern of queries after the prompt."""
        return self.pattern if self.decode == "moba" else Full()


def parse_rules(rules: Sequence[Mapping[str, Any]] | None, where: str = "attention") -> tuple[Rule, ...]:
    """Rules from plain mappings.

    Raises:
        InputError: an unknown key (with the nearest known one), or a value that no layer could use.
    """
    if rules is not None and (isinstance(rules, str | Mapping) or not isinstance(rules, Sequence)):
        raise InputError(f"{where}: want a list of rules like [{{layers: ':', pattern: moba, ...}}], got {rules!r}")
    parsed = []
    for i, rule in enumerate(rules or ()):
        if not isinstance(rule, Mapping):
            raise InputError(f"{where}[{i}]: want a mapping like {{layers: ':', pattern: moba, ...}}, got {rule!r}")
        refuse_unknown(rule, RULE_KEYS, f"{where}[{i}]")
        parsed.append(Rule(**rule))
        _check(parsed[-1], f"{where}[{i}]")
    return tuple(parsed)


def _check(rule: Rule, where: str) -> None:
    choices = (("pattern", PATTERNS), ("decode", DECODES), ("kconv", (0, *KCONV_WIDTHS)))
    for name, allowed in choices:
        value = getattr(rule, name)
        if value is not None and value not in allowed:
            raise InputError(f"{where}.{name}: want one of {', '.join(map(str, allowed))}, got {value!r}")
    for name in ("block_size", "top_k"):
        value = getattr(rule, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise InputError(f"{where}.{name}: want an integer >= 1, got {value!r}")
    if rule.backend is not None and not isinstance(rule.backend, str):
        raise InputError(f"{where}.backend: want auto or the name of a backend, got {rule.backend!r}")


def resolve(rules: Sequence[Rule], num_layers: int, where: str = "attention") -> tuple[LayerAttention, ...]:
    """The attention of every layer; layers no rule names are full.

    Raises:
        InputError: a layer that is not there, a slice that is none, or ``moba`` without its sizes.
    """
    return tuple(resolve_layer(rules, number, num_layers, where) for number in range(num_layers))


def resolve_layer(rules: Sequence[Rule], number: int, num_layers: int, where: str = "attention") -> LayerAttention:
    """The attention of one layer; see ``resolve``. Cheap enough to ask in every call of a layer."""
    said: dict[str, Any] = {}
    for i, rule in enumerate(rules):
        if number in _layers(rule.layers, num_layers, f"{where}[{i}].layers"):
            said.update(rule.as_dict())
    return _layer(said, f"{where}: layer {number}")


def _layers(layers: int | str, num_layers: int, where: str) -> range:
    if isinstance(layers, int) and not isinstance(layers, bool):
        if not -num_layers <= layers < num_layers:
            raise InputError(f"{where}: layer {layers} is not there; the model has {num_layers}")
        return range(num_layers)[layers : layers + 1 or None]
    parts = str(layers).split(":")
    try:
        if len(parts) == 1:
            return _layers(int(parts[0]), num_layers, where)
        start, stop, step = ([int(part) if part.strip() else None for part in parts] + [None])[:3]
        if len(parts) > 3 or step == 0:
            raise ValueError
    except ValueError:
        raise InputError(f"{where}: want a layer number or a Python slice like ':' or '-3:', got {layers!r}") from None
    return range(num_layers)[start:stop:step]


def _layer(said: Mapping[str, Any], where: str) -> LayerAttention:
    sizes = {name: said.get(name) for name in ("block_size", "top_k")}
    pattern: Pattern = Full()
    if said.get("pattern", "full") == "moba":
        missing = [name for name, value in sizes.items() if value is None]
        if missing:
            raise InputError(f"{where}: pattern moba needs {' and '.join(missing)}")
        pattern = MoBA(int(said["block_size"]), int(said["top_k"]))
    rest = {name: said[name] for name in ("backend", "decode", "kconv") if name in said}
    return LayerAttention(pattern, **rest)


def moba_rules(moba: Mapping[str, Any] | None) -> tuple[Rule, ...]:
    """The rules of a config's object ``moba``, ``{"attention": [rules], "provenance": {...}}``.

    Raises:
        InputError: something else, an unknown key, or rules that ``parse_rules`` refuses.
    """
    if moba is None:
        return ()
    if not isinstance(moba, Mapping):
        raise InputError(f"moba: want a mapping like {{attention: [...]}}, got {moba!r}")
    refuse_unknown(moba, MOBA_KEYS, "moba")
    return parse_rules(moba.get("attention"), "moba.attention")


def join_rules(
    own: Sequence[Mapping[str, Any]] | None, later: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """``later`` rules after a checkpoint's ``own``: what ``attention`` means wherever it is given with a checkpoint.

    What a later rule for all layers says is dropped from the rules before it, so that lists do not grow when a
    checkpoint is converted again and again.

    Raises:
        InputError: rules that ``parse_rules`` refuses.
    """
    parse_rules(own, "moba.attention")
    parse_rules(later)
    joined: list[dict[str, Any]] = []
    named: set[str] = set()
    for rule in reversed([*(own or ()), *(later or ())]):
        kept = {key: value for key, value in rule.items() if key == "layers" or key not in named}
        if kept.keys() - {"layers"}:
            joined.insert(0, kept)
        if rule.get("layers", ":") == ":":
            named |= {key for key, value in rule.items() if key != "layers" and value is not None}
    return joined
