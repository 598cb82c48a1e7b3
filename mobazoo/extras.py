"""Optional libraries: what needs one says so before it begins, and names the extra that brings it."""

from __future__ import annotations

from importlib.util import find_spec

from mobazoo.errors import UnsupportedError


def require(library: str, what: str, extra: str) -> None:
    """Refuses to begin without a library.

    Args:
        library: its name in Python.
        what: the part of a recipe that needs it, for the message.
        extra: what to install.

    Raises:
        UnsupportedError: it is not here.
    """
    if find_spec(library) is None:
        raise UnsupportedError(f"{what}: needs {library}, which is not here; pip install '{extra}'")
