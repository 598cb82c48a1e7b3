"""A PyTorch model zoo for Mixture of Block Attention (MoBA, arXiv 2502.13189)."""

from importlib import import_module
from typing import TYPE_CHECKING

from mobazoo._version import __version__
from mobazoo.errors import InputError, MobazooError, UnsupportedError

if TYPE_CHECKING:
    from mobazoo.zoo import load, register

__all__ = ["InputError", "MobazooError", "UnsupportedError", "__version__", "load", "register"]

# What imports torch and transformers is looked up late: `import mobazoo` and `mobazoo --help` stay light.
_LATE = {"load": "zoo", "register": "zoo"}


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(import_module(f"mobazoo.{_LATE[name]}"), name)
    raise AttributeError(f"module 'mobazoo' has no attribute {name!r}")
