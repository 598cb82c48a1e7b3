"""What a layer computes. Plain data: importing this needs no torch."""

from dataclasses import dataclass

from mobazoo.errors import InputError


@dataclass(frozen=True, slots=True)
class Full:
    """Causal attention over the whole document."""


@dataclass(frozen=True, slots=True)
class MoBA:
    """Mixture of Block Attention (arXiv 2502.13189, section 2.2).

    Args:
        block_size: tokens in a block, >= 1, counted from each document's first token.
        top_k: blocks a query reads, its own included, >= 1; 1 is block-local attention.

    Raises:
        InputError: if either is not an integer >= 1.
    """

    block_size: int
    top_k: int

    def __post_init__(self) -> None:
        for name in ("block_size", "top_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"MoBA.{name} must be an integer >= 1, got {value!r}")

    def covers(self, length: int) -> bool:
        """Whether a document of ``length`` tokens is read whole, so that MoBA is exactly full attention."""
        return self.top_k * self.block_size >= length


Pattern = Full | MoBA
