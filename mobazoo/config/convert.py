"""What a conversion is asked to do. Plain data: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mobazoo.config.dtypes import DTYPES
from mobazoo.config.rope import EXTENSIONS
from mobazoo.config.rules import parse_rules
from mobazoo.errors import InputError

DIRECTIONS = ("zoo", "hf")


@dataclass(frozen=True, slots=True)
class RopeExtension:
    """A longer context by rescaled rotary frequencies; give ``factor`` or ``max_positions``, the other follows.

    Frequencies that are scaled already are scaled again, the factors multiply. Where a plain configuration cannot say
    the result (anything over ``llama3``, ``linear`` over ``yarn``), the zoo's says it in ``moba.rope``.

    Attributes:
        type: ``linear`` (position interpolation, arXiv 2306.15595) or ``yarn`` (arXiv 2309.00071).
        factor: new context over old, > 1.
        max_positions: new context in tokens.
    """

    type: str = "linear"
    factor: float | None = None
    max_positions: int | None = None


@dataclass(frozen=True, slots=True)
class ConvertRecipe:
    """One conversion of a checkpoint folder.

    Attributes:
        source: folder or Hub id, plain Hugging Face or zoo.
        dest: folder to write.
        to: ``zoo``, or ``hf`` for a plain dense checkpoint.
        attention: per-layer rules after the source's own; ``kconv: 3`` in a rule adds a zero key convolution.
        dtype: ``float32``, ``bfloat16`` or ``float16`` (None: as stored).
        max_shard_size: bytes, or a size like ``5GB`` (None: the source's shards).
        rope: longer context (None: unchanged).
        revision: branch, tag or commit of a Hub source.
        verify: whether to prove the result before it is put in place.
        overwrite: whether an existing checkpoint at ``dest`` may be replaced.
    """

    source: str
    dest: str
    to: str = "zoo"
    attention: list[dict[str, Any]] = field(default_factory=list)
    dtype: str | None = None
    max_shard_size: int | str | None = None
    rope: RopeExtension | None = None
    revision: str | None = None
    verify: bool = True
    overwrite: bool = False

    def check(self) -> None:
        """Everything that can be known without looking at the source.

        Raises:
            InputError: a value that no conversion could use.
        """
        _one_of("to", self.to, DIRECTIONS)
        if self.dtype is not None:
            _one_of("dtype", self.dtype, DTYPES)
        if self.to == "hf" and self.attention:
            raise InputError("convert.attention: a plain Hugging Face checkpoint has no rules; drop them, or to: zoo")
        parse_rules(self.attention, "convert.attention")
        size = self.max_shard_size
        if size is not None and (isinstance(size, bool) or not size or (isinstance(size, int) and size < 0)):
            raise InputError(f"convert.max_shard_size: want bytes or a size like 5GB, got {size!r}")
        if self.rope is not None:
            _one_of("rope.type", self.rope.type, EXTENSIONS)
            if (self.rope.factor is None) == (self.rope.max_positions is None):
                raise InputError("convert.rope: give either factor or max_positions, the other follows from the source")


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"convert.{name}: want one of {', '.join(known)}, got {value!r}")
