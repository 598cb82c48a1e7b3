"""The pages of docs/benchmarks: written whole by a command, never by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_WRITTEN = "Written by `mobazoo bench"


def bench_page(
    title: str,
    suite: str,
    about: Mapping[str, str],
    words: Sequence[str],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    after: Sequence[str],
) -> str:
    """A page as Markdown.

    Args:
        title: its heading.
        suite: of ``mobazoo bench --suite`` (empty: none).
        about: the machine.
        words: lines on how it was measured.
        header: of the table.
        rows: of the table.
        after: lines below it.
    """
    lines = [
        f"# {title}",
        "",
        f"{_WRITTEN}{f' --suite {suite}' if suite else ''} --markdown ...`; {described(about)}.",
        "",
        *words,
        "",
        *("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)),
        "",
        *after,
    ]
    return "\n".join(lines) + "\n"


def is_bench_page(text: str) -> bool:
    """Whether ``bench_page`` made it."""
    return f"\n{_WRITTEN}" in text


def described(about: Mapping[str, str]) -> str:
    """A machine in a line."""
    return ", ".join(f"{name} {value}" for name, value in about.items())
