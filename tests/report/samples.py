"""Results of a run that never was, in every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobazoo.bench.prefill import summary
from mobazoo.config.bench import BenchRecipe
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


def sweep() -> list[dict[str, Any]]:
    rows = []
    for mode, lengths in (("prefill", (4096, 8192, 16384)), ("decode", (8192, 65536))):
        for length in lengths:
            row = {
                "mode": mode,
                "dtype": "bfloat16",
                "length": length,
                "block_size": length // 64,
                "top_k": 3,
                "count": 64,
            }
            runs: list[dict[str, Any]] = [{"name": "naive", "skipped": "needs about 80 GiB, there are 20 GiB"}]
            for name, one in (("sdpa", 0.1 * length / 4096), ("MoBA, auto", 0.05)):
                took = [one, 2 * one, 3 * one]
                runs.append(
                    {
                        "name": name,
                        "seconds": took,
                        "median_s": 2 * one,
                        "peak_bytes": None,
                        "against": "sdpa",
                        "speedup": 2.0,
                    }
                )
            rows.append({**row, "share_read": 0.1, "tile_density": 0.9 if mode == "prefill" else None, "runs": runs})
    return rows


def probe() -> dict[str, Any]:
    heads = [0.4, 0.6, 0.8, 0.95]

    def setting(top_k: int) -> dict[str, Any]:
        layers = [{"mass": heads, "best": heads, "hit": heads, "density": 0.9} for _ in range(4)]
        return {"block_size": 64, "top_k": top_k, "share_read": 0.1 * top_k, "layers": layers}

    heard = [{"gap": heads, "snr": heads, "measured": heads} for _ in range(4)]
    changes = [{"mean": mean, "error": 0.001} for mean in (0.02, 0.001, -0.0005, 0.003)]
    rules = [{"layers": ":", "pattern": "moba", "block_size": 64, "top_k": 3}, {"layers": 0, "pattern": "full"}]
    suggested = {"block_size": 64, "top_k": 3, "layers": changes, "full": [0], "rules": rules}
    return {
        "texts": {"count": 8, "length": 1024},
        "grid": [setting(2), setting(3)],
        "signal": [{"block_size": 64, "layers": heard}],
        "suggested": {**suggested, "trust": {"level": "high", "why": "it beats them"}},
    }


def recall() -> dict[str, Any]:
    def cells(worse: float) -> list[dict[str, Any]]:
        return [
            {
                "task": task,
                "length": length,
                "depth": depth,
                "score": {"mean": max(0.0, 1 - worse * length / 8192 * (1 - depth)), "error": 0.1},
                "loss": {"mean": 0.1 + worse, "error": None},
            }
            for task in ("needle", "tracking")
            for length in (1024, 4096, 8192)
            for depth in (0.0, 0.5, 1.0)
        ]

    return {"samples": 4, "settings": {"full": cells(0.2), "moba": cells(0.9)}}


def write_run(folder: Path) -> Path:
    """Everything a run of the quickstart leaves, but checkpoints."""
    texts = {"count": 40, "length": 1024}
    recipe = BenchRecipe("model")
    write_result(folder / "after.json", "eval", recipe, {"texts": texts, "loss": loss(-0.3), "choices": choices()})
    write_result(folder / "before.json", "eval", recipe, {"texts": texts, "loss": loss(0.0)})
    write_result(folder / "prefill.json", "bench", recipe, {"prefill": prefill()})
    write_result(folder / "probe.json", "probe", recipe, {"probe": probe()})
    write_result(folder / "recall.json", "eval", recipe, {"recall": recall()})
    scored = {"samples": 3, "metrics": {"acc": {"value": 0.75, "error": 0.25}}}
    tasks = {"version": "0.4.13", "settings": {"full": {"endings<b>": scored}, "moba": {"endings<b>": scored}}}
    write_result(folder / "tasks.json", "eval", recipe, {"lm_eval": tasks})
    write_result(folder / "sweep.json", "bench", recipe, {"sweep": sweep()})
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
