"""Results of a run that never was, in every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobazoo.config.bench import BenchRecipe
from mobazoo.prefill import summary
from mobazoo.results import write_result

HOSTILE = '</pre><script src="http://evil.example/x.js">alert("&")</script>'


def loss(shift: float) -> dict[str, Any]:
    def setting(more: float, share: float) -> dict[str, Any]:
        def said(mean: float) -> dict[str, float]:
            return {"mean": mean, "error": 0.05}

        buckets = [
            {"first": 1 + 128 * i, "last": 128 * (i + 1), "loss": said(4 + shift + 2 / (i + 1) + more * i / 8)}
            for i in range(8)
        ]
        return {
            "share_read": share,
            "mean": said(4.5 + shift + more),
            "trailing": said(4.2 + shift + more),
            "difference": {"mean": more, "error": 0.01},
            "trailing_difference": {"mean": more, "error": 0.02},
            "by_position": buckets,
        }

    return {"trailing_tokens": 256, "settings": {"full": setting(0.0, 1.0), "moba": setting(0.25, 0.4)}}


def choices() -> dict[str, Any]:
    def chosen(head: int) -> list[list[int]]:
        return [sorted({(t * 7 + head) % (t // 64), (t // 64) // 2}) if t >= 64 else [] for t in range(1024)]

    layer = {"layer": 2, "block_size": 64, "heads": {str(head): chosen(head) for head in range(4)}}
    return {"setting": "moba", "text": "lib/a<b>.py", "layers": [layer]}


def prefill() -> list[dict[str, Any]]:
    rows = []
    for length in (1024, 2048, 4096, 8192, 16384):
        full, moba = 0.05 * (length / 1024) ** 2, 0.06 * length / 1024
        rows.append({"length": length, "share_read": 0.3, **summary([full, full, full], [moba, moba, moba])})
    return rows


def write_run(folder: Path) -> Path:
    """Everything a run of the quickstart leaves, but checkpoints."""
    texts = {"count": 40, "length": 1024}
    recipe = BenchRecipe("model")
    write_result(folder / "after.json", "eval", recipe, {"texts": texts, "loss": loss(-0.3), "choices": choices()})
    write_result(folder / "before.json", "eval", recipe, {"texts": texts, "loss": loss(0.0)})
    write_result(folder / "prefill.json", "bench", recipe, {"prefill": prefill()})
    text = {"prompt": "def f(\n", "text": HOSTILE, "prompt_tokens": 3, "new_tokens": 40, "seconds": 1.25}
    write_result(folder / "text.json", "generate", recipe, {"generate": text})
    (folder / ".stages").mkdir()
    for number, name in enumerate(("before", "after", "prefill", "text", "report"), 1):
        stamp = {
            "digest": "",
            "verb": "report" if name == "report" else "eval",
            "command": f"mobazoo eval loss dest={name}.json",
            "recipe": {"dest": f"{name}.json"},
            "line": f"did {name}",
            "outputs": [str(folder / f"{name}.json")],
            "seconds": 1.5,
            "mobazoo": "0.1.0",
        }
        (folder / ".stages" / f"{number:02}-eval.json").write_text(json.dumps(stamp))
    return folder
