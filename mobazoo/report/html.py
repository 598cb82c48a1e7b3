"""Pieces of HTML: everything that comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_MADE = '<meta name="generator" content="mobazoo report"/>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide; columns of numbers stand right."""
    numbers = [all(row[i][:1].isdigit() or row[i][:1] in "+-" for row in rows if row[i]) for i in range(len(header))]
    kinds = [' class="number"' if number else "" for number in numbers]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(svg: str, alternative: str, caption: str) -> str:
    """A plot with what it shows in words."""
    named = svg.replace("<svg", f'<svg role="img" aria-label="{escape(alternative)}"', 1)
    return f"<figure>{named}<figcaption>{escape(caption)}</figcaption></figure>"


def more(summary: str, *content: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(content)}</details>"


def section(title: str, *content: str) -> str:
    """A part of the page."""
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def paragraph(text: str, kind: str = "") -> str:
    """Plain text."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def length_label(length: int) -> str:
    """16384 as people write it, 16K."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def page(title: str, css: str, content: str) -> str:
    """The whole document; it refers to nothing outside itself."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<meta name="color-scheme" content="light dark"/>{_MADE}'
        f"<title>{escape(title)}</title><style>{css}</style></head><body><main>{content}</main></body></html>\n"
    )


def is_page(text: str) -> bool:
    """Whether ``page`` made it."""
    return _MADE in text
