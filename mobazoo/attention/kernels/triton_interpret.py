"""Triton's interpreter under NumPy 2.4: loops whose bounds a kernel has loaded.

The interpreter keeps a scalar as an array of one element and asks ``int()`` of it for ``range``, which NumPy 2.4
refuses (seen with Triton 3.6). Compiled kernels never come here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from triton.runtime import interpreter


@cache
def mend() -> None:
    """Lets a loaded scalar be a loop's bound, once for the process."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
