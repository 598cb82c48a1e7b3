"""The recipe of ``mobazoo bench RECIPE`` for attention alone. Plain data: importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from mobazoo.attention.pattern import MoBA
from mobazoo.config.dtypes import DTYPES
from mobazoo.config.keys import nearest
from mobazoo.errors import InputError

MODES = ("prefill", "train", "decode")
RIVALS = ("sdpa", "flash-attn", "naive")


@dataclass(frozen=True, slots=True)
class Blocks:
    """A setting of MoBA; one of ``block_size`` and ``count`` is given.

    Attributes:
        top_k: blocks a query reads, its own included.
        block_size: tokens of a block.
        count: blocks of a row instead: they grow with the length, and sparsity stays.
    """

    top_k: int
    block_size: int | None = None
    count: int | None = None

    def pattern(self, length: int) -> MoBA:
        """The setting at a length."""
        return MoBA(self.block_size or max(1, -(-length // (self.count or 1))), self.top_k)


@dataclass(frozen=True, slots=True)
class SweepRecipe:
    """Attention alone on random inputs: MoBA by backends, and its rivals, by mode, dtype, setting and length.

    Attributes:
        lengths: tokens of a row.
        blocks: settings of MoBA, ``{block_size: 512, top_k: 3}`` or ``{count: 64, top_k: 3}`` each.
        modes: ``prefill`` (forward), ``train`` (forward + backward) and ``decode`` (one token against a cache of
            ``length`` tokens, whose centroids are there).
        backends: that compute MoBA, ``auto`` or by name.
        against: ``sdpa`` and ``flash-attn`` (full attention), ``naive`` (the same MoBA by a dense mask in memory: the
            backend ``reference``). Ratios are to the first that was timed.
        dtypes: of q, k and v.
        batch: rows.
        query_heads: of a row.
        key_heads: of a row.
        head_dim: numbers of a head.
        rounds: times each is timed, all of them in turn.
        longest: seconds; what would take longer by its time at a shorter length is left out, and said.
        memory: GiB; what would need more is left out, and said (None: what is free).
        dest: JSON file of the result (None: the console only).
        device: ``auto`` takes a GPU if there is one.
    """

    lengths: list[int]
    blocks: list[Blocks]
    modes: list[str] = field(default_factory=lambda: ["prefill"])
    backends: list[str] = field(default_factory=lambda: ["auto"])
    against: list[str] = field(default_factory=lambda: ["sdpa"])
    dtypes: list[str] = field(default_factory=lambda: ["float32"])
    batch: int = 1
    query_heads: int = 4
    key_heads: int = 2
    head_dim: int = 64
    rounds: int = 3
    longest: float = 60.0
    memory: float | None = None
    dest: str | None = None
    device: str = "auto"

    def check(self) -> None:
        """Everything that can be known without torch.

        Raises:
            InputError: a value that no timing could use.
        """
        for name, known in (("modes", MODES), ("dtypes", DTYPES), ("against", RIVALS)):
            for said in getattr(self, name):
                if said not in known:
                    raise InputError(f"bench.{name}: unknown {said!r}; {nearest(said, known)}")
        for name in ("lengths", "blocks", "modes", "backends", "against", "dtypes"):
            if not getattr(self, name):
                raise InputError(f"bench.{name}: want at least one, got none")
        if min(self.lengths) < 1:
            raise InputError(f"bench.lengths: want numbers of tokens >= 1, got {self.lengths}")
        for name in ("batch", "query_heads", "key_heads", "head_dim", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"bench.{name}: want a number >= 1, got {getattr(self, name)}")
        if self.query_heads % self.key_heads:
            raise InputError(
                f"bench.query_heads: want a multiple of key_heads={self.key_heads}, got {self.query_heads}"
            )
        for name in ("longest", "memory"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"bench.{name}: want a number above 0, got {value:g}")
        for number, blocks in enumerate(self.blocks):
            self._check_blocks(blocks, f"bench.blocks[{number}]")

    @staticmethod
    def _check_blocks(blocks: Blocks, where: str) -> None:
        if (blocks.block_size is None) == (blocks.count is None):
            raise InputError(f"{where}: want one of block_size and count, got {'both' if blocks.count else 'none'}")
        for name in ("top_k", "block_size", "count"):
            value = getattr(blocks, name)
            if value is not None and value < 1:
                raise InputError(f"{where}.{name}: want a number >= 1, got {value}")
