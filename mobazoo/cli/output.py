"""What verbs print: tables and YAML on stdout, notes and progress on stderr; plain where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TimeRemainingColumn
from rich.table import Table


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table: drawn on a terminal, tab-separated lines with a header line anywhere else.

    Numbers stand right; nothing is cut off, long cells wrap.
    """
    if not sys.stdout.isatty():
        for row in (header, *rows):
            print(*("" if cell is None else str(cell).replace("\t", " ") for cell in row), sep="\t")
        return
    drawn = Table(title=escape(title) or None, title_justify="left")
    for i, name in enumerate(header):
        numbers = all(str(row[i])[:1].isdigit() for row in rows if row[i] not in (None, ""))
        drawn.add_column(escape(name), justify="right" if numbers and rows else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    Console().print(drawn)


def say(text: str = "") -> None:
    """A line of the answer."""
    print(text)


def note(text: str) -> None:
    """A line about what is going on, on stderr."""
    Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print(text)


def count(number: float) -> str:
    """A large number in three digits: 1.24B, 131K."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def size(nbytes: float) -> str:
    """Bytes as people write them: 16 GiB, 2 KiB."""
    for unit, one in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= one:
            return f"{nbytes / one:.3g} {unit}"
    return f"{nbytes:.0f} bytes"


def tokens(length: int) -> str:
    """A length in tokens the way people write it: 8K, 128K, 1M are powers of two."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if length >= size and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each piece of work: called with its name, what is done and what there is in all (0: unknown).

    Where nobody watches, one line when a piece begins.
    """
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total or None)
                if not console.is_terminal:
                    note(f"{what} ...")
            bars.update(tasks[what], completed=done, total=total or None)

        yield update
