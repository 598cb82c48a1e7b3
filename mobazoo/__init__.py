"""A PyTorch model zoo for Mixture of Block Attention (MoBA, arXiv 2502.13189)."""

from mobazoo._version import __version__
from mobazoo.errors import InputError, MobazooError, UnsupportedError

__all__ = ["InputError", "MobazooError", "UnsupportedError", "__version__"]
