"""Triton's interpreter, where it does not do what a compiled kernel does (Triton 3.6 with NumPy 2.4).

- It keeps a scalar as an array of one element and asks ``int()`` of it for ``range``, which NumPy 2.4 refuses.
- It multiplies bfloat16 matrices as if their bits were integers.
- It cuts float32 to bfloat16 where a GPU rounds to the nearest even number.

Compiled kernels never come here.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter


@cache
def mend() -> None:
    """Puts that right, once for the process."""
    patch, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            bits = torch.tensor(src.data).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, src, dst_type)

    interpreter._patch_lang_tensor = patched
    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _widened(x: Any) -> Any:
    if x.dtype.scalar != tl.bfloat16:
        return x
    wide = torch.tensor(x.data.view("int16")).view(torch.bfloat16).float().numpy()
    return interpreter.TensorHandle(wide, tl.float32)
