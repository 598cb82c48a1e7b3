"""The zoo's model files: what ``models/<family>/<name>.yaml`` may say. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mobazoo.config.keys import refuse_unknown
from mobazoo.config.rules import moba_rules
from mobazoo.errors import InputError

PACKAGE = "mobazoo.models"


@dataclass(frozen=True)
class ModelEntry:
    """One model of the zoo.

    Attributes:
        name: the file's name without ``.yaml``.
        family: the folder it lies in, a Hugging Face model type such as ``llama``.
        licence: of the weights at ``source``.
        parameters: trainable numbers, tied ones once; a test counts them.
        config: the fields of the family's Hugging Face config that differ from its defaults.
        attention: per-layer rules; ``[]`` is full attention everywhere.
        source: Hub id of the weights (None: there are none, the model is for experiments).
    """

    name: str
    family: str
    licence: str
    parameters: int
    config: dict[str, Any]
    attention: list[dict[str, Any]] = field(default_factory=list)
    source: str | None = None


def model_names() -> tuple[str, ...]:
    """Names of all model files, family by family."""
    return tuple(_model_files())


def model_entry(name: str, overrides: Sequence[str] = ()) -> ModelEntry:
    """Reads a model file.

    Args:
        name: one of ``model_names()``.
        overrides: ``key=value`` with YAML values, applied to the file; ``attention[0].top_k=4`` reaches into lists and
            ``attention=[]`` is the same model with full attention.

    Raises:
        InputError: an unknown name or key (with the nearest known one), a missing or mistyped field, ``${...}``, or
            rules that no layer could use.
    """
    known = _model_files()
    if name not in known:
        near = get_close_matches(name, known, 1)
        raise InputError(
            f"unknown model {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}")
        )
    family, file = known[name]
    return parse_entry(name, family, file.read_text(encoding="utf-8"), overrides)


def parse_entry(name: str, family: str, text: str, overrides: Sequence[str] = ()) -> ModelEntry:
    """A model file's text to an entry; see ``model_entry``."""
    try:
        tree = OmegaConf.create(text)
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"model {name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, DictConfig):
        raise InputError(f"model {name}: want a mapping with config, attention, licence, ...; got {text[:40]!r}")
    for override in overrides:
        _apply(tree, override)
    said: Any = OmegaConf.to_container(tree, resolve=False)
    _refuse_interpolation(said, f"model {name}")
    settable = [f for f in fields(ModelEntry) if f.name not in ("name", "family")]
    refuse_unknown(said, [f.name for f in settable], f"model {name}")
    for key, kind in (("licence", str), ("parameters", int), ("config", dict)):
        if not isinstance(said.get(key), kind):
            raise InputError(f"model {name}.{key}: want {kind.__name__}, got {said.get(key)!r}")
    moba_rules({"attention": said.get("attention")})
    return ModelEntry(name=name, family=family, **{key: value for key, value in said.items() if value is not None})


def _model_files() -> dict[str, tuple[str, Traversable]]:
    """Family and file of every model by name."""
    found = {}
    for folder in sorted(files(PACKAGE).iterdir(), key=lambda path: path.name):
        if folder.is_dir():
            for file in sorted(folder.iterdir(), key=lambda path: path.name):
                if file.name.endswith(".yaml"):
                    found[file.name.removesuffix(".yaml")] = (folder.name, file)
    return found


def _apply(tree: DictConfig, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"override {override!r}: want key=value, like attention[0].top_k=4")
    _refuse_interpolation(value, f"override {key}")  # before anything could read it
    try:
        OmegaConf.update(tree, key, OmegaConf.from_dotlist([f"value={value}"])["value"])
    except (YAMLError, OmegaConfBaseException, IndexError, TypeError, ValueError) as error:
        raise InputError(f"override {override!r}: {' '.join(str(error).split())}") from None


def _refuse_interpolation(node: object, where: str) -> None:
    """``${...}`` could read the environment, and what it read would end in logs and checkpoints."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            _refuse_interpolation(value, f"{where}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            _refuse_interpolation(value, f"{where}[{i}]")
    elif isinstance(node, str) and "${" in node:
        raise InputError(f"{where}: ${{...}} is not allowed, got {node!r}; write the value")
