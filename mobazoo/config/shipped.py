"""What the package ships as YAML: recipes and model sizes, found by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from mobazoo.config.keys import nearest
from mobazoo.errors import InputError

RECIPES = "mobazoo.recipes"
MODELS = "mobazoo.models"


@dataclass(frozen=True)
class Source:
    """A YAML file: its text, and the words that name it in messages."""

    name: str
    where: str
    text: str

    @property
    def purpose(self) -> str:
        """The first line of the first comment."""
        first = self.text.lstrip().splitlines()[:1]
        return first[0].lstrip("# ").rstrip() if first and first[0].startswith("#") else ""

    @property
    def command(self) -> str:
        """The command in the first comment, empty where there is none."""
        for line in self.text.lstrip().splitlines():
            if not line.startswith("#"):
                break
            if line.lstrip("# ").startswith("mobazoo "):
                return line.lstrip("# ").rstrip()
        return ""


def shipped(package: str) -> dict[str, Source]:
    """Every YAML file under ``mobazoo.recipes`` or ``mobazoo.models``, by ``folder/name``."""
    return {name: Source(name, name, file.read_text("utf-8")) for name, file in sorted(_walk(files(package)))}


def find(given: str | Path, package: str = RECIPES, folder: str = "") -> Source:
    """A YAML file by path, or a shipped one by name.

    Args:
        given: a path, ``folder/name``, or ``name`` alone where only one folder (or ``folder``) has it.
        package: ``mobazoo.recipes`` or ``mobazoo.models``.
        folder: where a name alone is looked for first.

    Raises:
        InputError: nothing there, with the nearest shipped name.
    """
    path, what = Path(given), package.rpartition(".")[2].removesuffix("s")
    if path.is_file():
        try:
            return Source(path.stem, str(given), path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{given}: cannot be read as text: {error}") from None
    names = shipped(package)
    name = path.as_posix().removeprefix(f"{what}s/").removesuffix(".yaml")
    by_stem = [known for known in names if known.rpartition("/")[2] == name]
    for known in (name, f"{folder}/{name}", *(by_stem if len(by_stem) == 1 else ())):
        if known in names:
            return names[known]
    if len(by_stem) > 1:
        raise InputError(f"{what} {str(given)!r} is in several folders; say one of {', '.join(by_stem)}")
    if path.is_dir():
        raise InputError(f"{given}: want a {what} file, got a folder")
    hint = nearest(
        name, [*names, *(known.rpartition("/")[2] for known in names)], f"`mobazoo {what}s` lists what there is"
    )
    raise InputError(f"{what} {str(given)!r}: no such file, and none of that name is shipped; {hint}")


def _walk(folder: Traversable, above: str = "") -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry, f"{above}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield above + entry.name.removesuffix(".yaml"), entry
