"""Unknown keys and names are errors that name the nearest known one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

from mobazoo.errors import InputError


def nearest(given: object, known: Collection[str], otherwise: str | None = None) -> str:
    """``did you mean 'x'?`` or, where nothing is near, ``otherwise`` (None: all that is known)."""
    near = get_close_matches(str(given), known, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(known)}" if otherwise is None else otherwise


def unknown(where: str, key: object, known: Collection[str]) -> str:
    """The line about a key that is not there."""
    return f"{where + ': ' if where else ''}unknown key {key!r}; {nearest(key, known)}"


def refuse_unknown(given: Iterable[object], known: Sequence[str], where: str) -> None:
    """Checks keys against the known ones.

    Raises:
        InputError: the first unknown key, with the nearest known one or, if none is near, all of them.
    """
    for key in given:
        if key not in known:
            raise InputError(unknown(where, key, known))
