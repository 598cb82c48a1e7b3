"""Plain data against a dataclass schema: every problem as one line that starts with the key it is about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mobazoo.config.keys import unknown
from mobazoo.config.rules import Rule, parse_rules
from mobazoo.errors import InputError

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}
UNSET = "???"


def problems(value: Any, want: Any, key: str = "") -> Iterator[str]:
    """What is wrong with ``value`` for the type ``want``; nothing where it fits."""
    origin = get_origin(want)
    if want is Any:
        return
    if origin in (Union, UnionType):
        yield from _union(value, get_args(want), key)
    elif is_dataclass(want) and isinstance(want, type):
        yield from _dataclass(value, want, key)
    elif origin in (list, tuple) or want in (list, tuple):
        yield from _list(value, want, key)
    elif origin is dict or want is dict:
        if not isinstance(value, Mapping):
            yield _wrong(key, "a mapping", value)
        else:
            inner = (get_args(want) or (str, Any))[1]
            for name, item in value.items():
                yield from problems(item, inner, join(key, name))
    elif origin is Literal:
        if value not in get_args(want):
            yield _wrong(key, f"one of {', '.join(map(str, get_args(want)))}", value)
    elif not _fits(value, want):
        quote = "; quote it" if want in (str, Path) and isinstance(value, int | float) else ""
        yield _wrong(key, words(want), value) + quote


def type_at(schema: Any, parts: list[str | int], key: str = "") -> Any:
    """The type that the schema gives the key ``parts``.

    Raises:
        InputError: no such key, with the nearest known one.
    """
    if not parts or schema is Any:
        return schema
    part, *rest = parts
    options = [option for option in get_args(schema) if option is not NoneType] if _is_union(schema) else [schema]
    for option in options:
        if isinstance(part, int):
            if get_origin(option) in (list, tuple):
                return type_at(get_args(option)[0], rest, join(key, part))
        elif is_dataclass(option) and isinstance(option, type):
            hints = _hints(option)
            if part not in hints:
                raise InputError(unknown(key, part, list(hints)))
            return type_at(hints[part], rest, join(key, part))
        elif get_origin(option) is dict:
            return type_at(get_args(option)[1], rest, join(key, part))
    what = f"no list, so it has no item {part}" if isinstance(part, int) else f"no mapping, so it has no key {part!r}"
    raise InputError(f"{key or 'the recipe'}: {what}; it is {words(schema)}")


def join(key: str, part: Any) -> str:
    """``key.part`` or ``key[part]``."""
    if isinstance(part, int):
        return f"{key}[{part}]"
    return f"{key}.{part}" if key else str(part)


def words(want: Any) -> str:
    """A type as a person would say it."""
    if _is_union(want):
        return " or ".join(words(option) for option in get_args(want))
    if is_dataclass(want) and isinstance(want, type):
        return f"a mapping with the keys {', '.join(item.name for item in fields(want))}"
    if get_origin(want) is Literal:
        return f"one of {', '.join(map(str, get_args(want)))}"
    return _WORDS.get(get_origin(want) or want, str(want))


def mandatory(item: Field[Any]) -> bool:
    """Whether a field of a schema has no default."""
    return (item.default is MISSING or item.default == UNSET) and item.default_factory is MISSING


def _dataclass(value: Any, want: type, key: str) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield _wrong(key, words(want), value)
        return
    hints = _hints(want)
    for name, item in value.items():
        if name not in hints:
            yield unknown(key, name, list(hints))
        elif item != UNSET:
            yield from problems(item, hints[name], join(key, name))
    missing = [item.name for item in fields(want) if mandatory(item) and value.get(item.name, UNSET) == UNSET]
    if missing:
        paths = [join(key, name) for name in missing]
        how = " ".join(f"{path}=..." for path in paths)
        yield f"{', '.join(paths)}: missing; give it in the recipe or on the command line as {how}"


def _hints(schema: type) -> dict[str, Any]:
    """Types of a schema's keys; ``attention`` is a list of rules wherever it stands, as plain mappings too."""
    hints = get_type_hints(schema)
    if get_origin(hints.get("attention")) is list:
        hints["attention"] = list[Rule]
    return hints


def _list(value: Any, want: Any, key: str) -> Iterator[str]:
    if not isinstance(value, list | tuple):
        yield _wrong(key, "a list", value)
        return
    inner = (get_args(want) or (Any,))[0]
    found = [line for i, item in enumerate(value) for line in problems(item, inner, join(key, i))]
    yield from found
    if inner is Rule and not found:
        try:
            parse_rules(value, key)
        except InputError as error:
            yield str(error)


def _union(value: Any, options: tuple[Any, ...], key: str) -> Iterator[str]:
    if value is None and NoneType in options:
        return
    rest = [option for option in options if option is not NoneType]
    found = [list(problems(value, option, key)) for option in rest]
    if all(found):
        if len(rest) == 1:
            yield from found[0]
        else:
            yield _wrong(key, " or ".join(map(words, rest)), value)


def _fits(value: Any, want: Any) -> bool:
    if want in (str, Path):
        return isinstance(value, str)
    if want in (int, float):
        return isinstance(value, int if want is int else int | float) and not isinstance(value, bool)
    return isinstance(value, want)


def _is_union(want: Any) -> bool:
    return get_origin(want) in (Union, UnionType)


def _wrong(key: str, want: str, value: Any) -> str:
    got = "a mapping" if isinstance(value, Mapping) else "a list" if isinstance(value, list | tuple) else repr(value)
    return f"{key or 'the recipe'}: want {want}, got {'nothing' if value is None else got}"
