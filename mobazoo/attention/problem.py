"""``Problem``: what a backend is asked, as far as it can be known without looking at any tensor's values."""

from dataclasses import dataclass

import torch

from mobazoo.attention.pattern import MoBA, Pattern


@dataclass(frozen=True, slots=True)
class Problem:
    """One attention problem; backends say from it whether they can, ``auto`` chooses from it.

    Attributes:
        pattern: what is computed.
        device: ``cpu``, ``cuda``, ...
        dtype: of q, k and v.
        head_dim: ``D``.
        grad: whether a backward may follow.
        queries: ``T``.
        slots: ``S``.
        whole: every row is one document that fills it.
    """

    pattern: Pattern
    device: str
    dtype: torch.dtype
    head_dim: int
    grad: bool
    queries: int
    slots: int
    whole: bool = True

    @property
    def prefill(self) -> bool:
        """Whether the queries stand at all the slots."""
        return self.queries == self.slots

    @property
    def moba(self) -> bool:
        """Whether blocks are left out."""
        return isinstance(self.pattern, MoBA)
