"""Unknown keys are errors that name the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from mobazoo.errors import InputError


def refuse_unknown(given: Iterable[object], known: Sequence[str], where: str) -> None:
    """Checks keys against the known ones.

    Raises:
        InputError: the first unknown key, with the nearest known one or, if none is near, all of them.
    """
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
