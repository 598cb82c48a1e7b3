"""Every error that the library raises is met by some test on its text."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ERRORS = {"InputError", "UnsupportedError", "MobazooError", "VerificationError", "TypeError", "ValueError"}
# A run of text this long is not shared by accident; shorter fragments of a message must be met whole.
RUN, SHORTEST = 20, 8


def fragments(call: ast.Call) -> list[str]:
    """The fixed pieces of a message, without what is formatted into it."""
    formatted = {id(part) for node in ast.walk(call) if isinstance(node, ast.FormattedValue) for part in ast.walk(node)}
    found = [
        node.value.strip(" .,:;()[]'\"")
        for node in ast.walk(call)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in formatted
    ]
    return [text for text in found if len(text) >= SHORTEST and re.search(r"[a-z]{3}", text)]


def raised() -> Iterator[tuple[str, list[str]]]:
    """Where each error is made, and the pieces of its message; errors that only pass a message on have none."""
    for folder in ("mobazoo", "models"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                    pieces = fragments(node)
                    if pieces:
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", pieces


def asked() -> list[str]:
    """All text in tests that a message could be compared with: no docstrings, patterns cut at their wildcards."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                found += [piece.strip() for piece in re.split(r"\.\*|\|", node.value.replace("\\", ""))]
    return found


def met(piece: str, texts: list[str], everything: str) -> bool:
    width = min(len(piece), RUN)
    windows = (piece[at : at + width] for at in range(len(piece) - width + 1))
    return any(window in everything for window in windows) or any(
        len(text) >= SHORTEST and re.search(r"[a-z]{3}", text) and text in piece for text in texts
    )


def test_every_error_has_a_test_on_its_text() -> None:
    texts = asked()
    everything = "\0".join(texts)
    missing = [f"{where} {pieces}" for where, pieces in raised() if not any(met(p, texts, everything) for p in pieces)]
    assert missing == []


def test_the_scan_sees_what_nobody_asks_for() -> None:
    (call,) = (
        n for n in ast.walk(ast.parse("InputError(f'{x}: zqxw wjkk {y} vvvqq kkkj')")) if isinstance(n, ast.Call)
    )
    pieces = fragments(call)
    assert pieces == ["zqxw wjkk", "vvvqq kkkj"]
    found = [text for text in asked() if "zqx" not in text and "vvvqq" not in text]
    assert not any(met(piece, found, "\0".join(found)) for piece in pieces)
    assert len(list(raised())) > 100
