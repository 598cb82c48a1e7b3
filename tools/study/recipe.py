"""The recipe of a study."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mobazoo.config.data import Data
from mobazoo.config.recipe import parse_recipe, plain, to_yaml
from mobazoo.config.rules import parse_rules
from mobazoo.config.shipped import Source
from mobazoo.config.train import Stage, TrainRecipe
from mobazoo.errors import InputError

FULL, LOCAL = "full", "local"  # the arms whose difference says whether the data have anything far away to learn


@dataclass(frozen=True, slots=True)
class Recall:
    """Synthetic documents: facts among source lines in the first half, asked for in the last quarter.

    Attributes:
        share: of the training tokens that are in such documents.
        facts: in a document; each is asked for once.
        words: keys there are to choose from, and as many values; chance is one in ``words``.
        documents: to measure on.
    """

    share: float = 0.5
    facts: int = 24
    words: int = 64
    documents: int = 64


@dataclass(frozen=True, slots=True)
class Gain:
    """What full attention must gain from far tokens, or the study stops because it would show nothing.

    Attributes:
        fall: nats that its loss falls from the first to the last positions.
        trailing: nats that its trailing loss is below that of ``local``.
        recall: share of the questions that it answers beyond ``local``.
    """

    fall: float = 0.1
    trailing: float = 0.0
    recall: float = 0.2


@dataclass(frozen=True, slots=True)
class Arm:
    """One kind of attention.

    Attributes:
        attention: per-layer rules.
        schedule: stages over the run, if it changes.
        seeds: a run for each.
    """

    attention: list[dict[str, Any]] = field(default_factory=list)
    schedule: list[Stage] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True, slots=True)
class Study:
    """One study.

    Attributes:
        folder: keeps data, checkpoints and results.
        page: Markdown file to write; the plot lies beside it.
        train: keys of ``mobazoo train`` that all arms share.
        arms: by name; ``full`` and ``local`` must be there and are trained first.
        source: texts whose later parts use what earlier parts define.
        vocab: tokens of the tokenizer.
        documents: most source texts to measure the loss on.
        recall: the synthetic documents.
        gain: what must be there to be compared.
    """

    folder: str
    page: str
    train: dict[str, Any]
    arms: dict[str, Arm]
    source: Data = field(default_factory=lambda: Data("stdlib", min_chars=6000, validation=0.1))
    vocab: int = 2048
    documents: int = 64
    recall: Recall = field(default_factory=Recall)
    gain: Gain = field(default_factory=Gain)

    def check(self) -> None:
        """Everything that can be known before anything is made.

        Raises:
            InputError: a value that no study could use.
        """
        self.source.check("study.source")
        missing = [name for name in (FULL, LOCAL) if name not in self.arms]
        if missing:
            raise InputError(f"study.arms: {missing[0]!r} is missing; full and local say whether there is far to learn")
        for name, arm in self.arms.items():
            parse_rules(arm.attention, f"study.arms.{name}.attention")
            if not arm.seeds:
                raise InputError(f"study.arms.{name}.seeds: none; give at least one")
        if not 0 < self.recall.share < 1:
            raise InputError(f"study.recall.share: want a share between 0 and 1, got {self.recall.share}")
        if not 1 <= self.recall.facts <= self.recall.words:
            raise InputError(
                f"study.recall.facts: want 1 to {self.recall.words}, the words there are, got {self.recall.facts}"
            )
        for run in self.runs():
            run.recipe.check()

    @property
    def data(self) -> Path:
        """Folder of the tokenizer and the documents; another one for other data."""
        made = [plain(self.source), self.vocab, plain(self.recall), self.train.get("length")]
        return Path(self.folder, f"data-{_digest(made)}")

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return next(self.runs()).recipe.length

    def runs(self) -> Iterator[Run]:
        """Every training run, those first that decide whether to go on."""
        names = [FULL, LOCAL, *(name for name in self.arms if name not in (FULL, LOCAL))]
        firsts = [(name, self.arms[name].seeds[0]) for name in names]
        others = [(name, seed) for name in names for seed in self.arms[name].seeds[1:]]
        for name, seed in firsts + others:
            yield self._run(name, seed)

    def _run(self, name: str, seed: int) -> Run:
        arm = self.arms[name]
        given = {
            **self.train,
            "tokenizer": str(self.data / "tokenizer"),
            "data": {"path": str(self.data / "train.jsonl"), "format": "jsonl"},
            "attention": arm.attention,
            "schedule": plain(arm.schedule),
            "seed": seed,
            "dest": "",  # comes from all the rest
        }
        recipe = parse_recipe(Source("train", "study.train", to_yaml(given)), [], TrainRecipe)
        measured = [plain(recipe), plain(self.source), plain(self.recall), self.vocab, self.documents]
        digest = _digest(measured)
        dest = Path(self.folder, f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}-{digest}")
        return Run(name, seed, replace(recipe, dest=str(dest)), Path(self.folder, "results", f"{dest.name}.json"))


@dataclass(frozen=True, slots=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: its name.
        seed: of weights and order.
        recipe: of its training.
        result: file that says it is done, and what came of it; another name for another recipe.
    """

    arm: str
    seed: int
    recipe: TrainRecipe
    result: Path


def _digest(said: Any) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]
