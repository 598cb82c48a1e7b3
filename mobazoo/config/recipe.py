"""Recipes: YAML and ``key=value`` overrides into a dataclass, and back to YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mobazoo.config.rules import Rule
from mobazoo.config.schema import problems, type_at
from mobazoo.config.shipped import RECIPES, Source, find
from mobazoo.errors import InputError

T = TypeVar("T")
_NO_INTERPOLATION = (
    "${...} is refused, because a recipe is printed, stored in checkpoints and passed on, and ${oc.env:...} "
    "would put a secret of this machine into it; write the value, or give it as key=value"
)


def load_recipe(
    source: str | Path, overrides: Sequence[str], schema: type[T], *, folder: str = "", package: str = RECIPES
) -> T:
    """A recipe as an instance of its schema.

    Args:
        source: a path, or the name of a shipped recipe.
        overrides: ``key=value`` each, the value as YAML, the key into mappings and lists (``attention[0].top_k=4``).
        schema: a dataclass; fields without a default are mandatory, lists of ``Rule`` are checked as rules.
        folder: where a shipped recipe is looked for first.
        package: the package that ships it.

    Raises:
        InputError: anything wrong with it, in one line with file, line and key.
    """
    return parse_recipe(find(source, package, folder), overrides, schema)


def parse_recipe(source: Source, overrides: Sequence[str], schema: type[T]) -> T:
    """``load_recipe`` for a text that is already here."""
    config = _parse(source)
    for override in overrides:
        try:
            _override(config, override, schema)
        except InputError as error:
            raise InputError(f"override {override!r}: {error}") from None
    plain = OmegaConf.to_container(config)
    for problem in problems(plain, schema):
        raise InputError(f"{_where(source, overrides, problem)}: {problem}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        return cast(T, OmegaConf.to_object(merged))
    except InputError as error:
        raise InputError(f"{_where(source, overrides, str(error))}: {error}") from None
    except OmegaConfBaseException as error:
        raise InputError(f"{source.where}: {str(error).splitlines()[0]}") from None


def has_key(source: Source, key: str) -> bool:
    """Whether a recipe's text says a top-level key, for verbs that have several schemas.

    Raises:
        InputError: no YAML mapping.
    """
    return key in list(_parse(source))  # `in` alone does not see a key whose value is missing


def to_yaml(recipe: Any) -> str:
    """A recipe as YAML that loads to the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(recipe)))


def plain(recipe: Any) -> Any:
    """A recipe as JSON: mappings, lists and scalars; rules without the fields that say nothing."""
    if isinstance(recipe, Rule):
        return recipe.as_dict()
    if is_dataclass(recipe):
        return {item.name: plain(getattr(recipe, item.name)) for item in fields(recipe)}
    if isinstance(recipe, Mapping):
        return {str(name): plain(value) for name, value in recipe.items()}
    if isinstance(recipe, list | tuple):
        return [plain(item) for item in recipe]
    return str(recipe) if isinstance(recipe, Path) else recipe


def _parse(source: Source) -> DictConfig:
    try:
        for event in yaml.parse(source.text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
                raise InputError(f"{source.where}:{event.start_mark.line + 1}: {_NO_INTERPOLATION}")
        config = OmegaConf.create(source.text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{source.where}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{source.where}: not YAML: {' '.join(str(error).split())}") from None
    if isinstance(config, ListConfig) or list(config) == [source.text.strip()]:
        raise InputError(f"{source.where}: want a mapping of keys, got {'a list' if len(config) > 1 else 'no key'}")
    return config


def _override(config: DictConfig, override: str, schema: type) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\[-?\d+\]|\.[\w-]+)*", key):
        raise InputError("want key=value, like attention[0].top_k=4")
    if "${" in text:
        raise InputError(_NO_INTERPOLATION)
    parts = _parts(key)
    want = type_at(schema, parts)
    for i, part in enumerate(parts):
        if isinstance(part, int):
            _check_index(config, parts[:i], part)
    OmegaConf.update(config, key, _value(text, want), merge=False)


def _value(text: str, want: Any) -> Any:
    """The override's value: YAML, or the text as it stands where the key takes text and YAML would change it."""
    takes_text = not list(problems("", want))
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except yaml.YAMLError as error:
        if takes_text:
            return text
        raise InputError(f"not YAML: {getattr(error, 'problem', None) or error}") from None
    read = value["value"] if isinstance(value, dict) else None
    return text if takes_text and list(problems(read, want)) else read


def _check_index(config: DictConfig, parts: list[str | int], index: int) -> None:
    found: Any = config
    for part in parts:
        found = found.get(part) if isinstance(found, DictConfig) else found[part]
    if not isinstance(found, ListConfig) or not -len(found) <= index < len(found):
        name = ".".join(map(str, parts))
        has = f"has {len(found)} items, counted from 0" if isinstance(found, ListConfig) else "is not set"
        raise InputError(f"{name} {has}; give the whole list, {name}=[...], to add to it")


def _parts(key: str) -> list[str | int]:
    return [int(part) if re.fullmatch(r"-?\d+", part) else part for part in re.findall(r"[^.\[\]]+", key)]


def _where(source: Source, overrides: Sequence[str], problem: str) -> str:
    """File and line, or the override, that a problem is about; problems begin with their key."""
    key = problem.split(": ")[0].split(", ")[0]
    unknown = re.search(r"unknown key '(.+?)'; ", problem)
    parts = _parts(key) if re.fullmatch(r"[\w.\[\]-]+", key) else []
    parts += unknown.groups() if unknown else ()
    for override in reversed(overrides):
        given = _parts(override.partition("=")[0])
        if parts and parts[: len(given)] == given:
            return f"override {override!r}"
    line = None if ": missing;" in problem else _line(source.text, parts)
    return f"{source.where}:{line}" if line else source.where


def _line(text: str, parts: Sequence[str | int]) -> int | None:
    """The line of a key, or of the nearest thing above it that is there."""
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), None
    for part in parts:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode) and (found := [v for k, v in node.value if k.value == str(part)]):
            line = next(k for k, _ in node.value if k.value == str(part)).start_mark.line + 1
            node = found[0]
        else:
            break
    return line
