"""One seam for all attention: ``attend`` computes a pattern (``Full`` or ``MoBA``) with a chosen backend.

Shape legend, used everywhere: ``B`` rows, ``T`` query tokens, ``S`` key tokens, ``Hq``/``Hkv`` query/key heads,
``G = Hq // Hkv``, ``D`` head dim, ``N`` blocks of a row, ``K = top_k``. A *slot* is an index into ``S``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mobazoo.attention.pattern import Full, MoBA, Pattern

if TYPE_CHECKING:
    from mobazoo.attention.api import attend
    from mobazoo.attention.blocks import Centroids, centroids
    from mobazoo.attention.routing import Routes, route
    from mobazoo.attention.segments import Segments

__all__ = ["Centroids", "Full", "MoBA", "Pattern", "Routes", "Segments", "attend", "centroids", "route"]

# Patterns are plain data that recipes and `--help` need without torch, so what imports torch is looked up late.
_LATE = {
    "Centroids": "blocks",
    "Routes": "routing",
    "Segments": "segments",
    "attend": "api",
    "centroids": "blocks",
    "route": "routing",
}


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(import_module(f"mobazoo.attention.{_LATE[name]}"), name)
    raise AttributeError(f"module 'mobazoo.attention' has no attribute {name!r}")
