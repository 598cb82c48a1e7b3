"""Code that computes a pattern. Every module in this folder that has ``unsupported`` and ``run`` is a backend."""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

BACKENDS: dict[str, ModuleType] = {
    name: module
    for _, name, _ in iter_modules(__path__)
    if hasattr(module := import_module(f"{__name__}.{name}"), "unsupported")
}
