"""The GPU report in Markdown, written from what its sections left in JSON."""

from __future__ import annotations

from statistics import median
from typing import Any

from tools.gpu.auto import AUTO
from tools.gpu.measure import Rows
from tools.gpu.rivals import ATEN, TRITON

Sections = dict[str, dict[str, Any]]

_FASTER = {"64k": 10.0, "512k": 30.0, "1m": 9.0}  # times FlashAttention-2
_MEMORY = 1.15  # of FlashAttention-2's
_FAR, _EXACT = 1.0, 1.05  # of full attention's time, beyond four windows and up to one


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    sections = report["sections"]
    gpu = next(iter(sections.values()))["machine"]["gpu"]
    lines = [f"# {gpu}", "", "Written by `tools/gpu_report.sh`. Times are medians."]
    if gpu.startswith("none"):
        lines += ["", "**A dry run: tiny shapes on a CPU under Triton's interpreter. No figure here says anything.**"]
    lines += ["", "## targets", "", *targets(sections)]
    for name, found in sections.items():
        facts = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if key != "gpu")
        took = f"{found['took']:.0f} s" if "took" in found else "unfinished"
        lines += ["", f"## {name}", "", f"`{found['command']}`; {took}; {facts}.", ""]
        lines += [f"**{found['broke']}**", ""] if "broke" in found else []
        lines += [found["said"], ""] if "said" in found else []
        lines += table(found) if "rows" in found else []
        lines += where(found) if "floor" in found else []
        lines += auto(found["cases"]) if "cases" in found else []
        lines += ["", *found["lines"]] if found.get("lines") else []
    return "\n".join(lines) + "\n"


def targets(sections: Sections) -> list[str]:
    """Every target of docs/kernels.md: wanted, measured, met or not; for times also the floor and the share of it."""
    lines = ["| target | wanted | measured | | floor ms | ms | share of floor |", "| --- " * 7 + "|"]
    for name, wanted in _FASTER.items():
        found = sections.get(name, {})
        ours, theirs = (seconds(found.get("rows", {}), who) for who in (TRITON, ATEN))
        times = theirs / ours if ours and theirs else None
        floor = found["floor"]["all"]["seconds"] if "floor" in found else None
        costs = [f"{1e3 * floor:.1f}" if floor else "", f"{1e3 * ours:.1f}" if ours else ""]
        share = f"{floor / ours:.0%}" if floor and ours else ""
        lines.append(_line(f"{name}: times FlashAttention-2", wanted, times, at_least=True, rest=[*costs, share]))
    for name in _FASTER:
        rows = sections.get(name, {}).get("rows", {})
        ours, theirs = (rows.get(who, {}).get("bytes") for who in (TRITON, ATEN))
        lines.append(
            _line(f"{name}: memory of FlashAttention-2's", _MEMORY, ours / theirs if ours and theirs else None)
        )
    cases = sections.get("auto", {}).get("cases", [])
    far = [ratio for case in cases if case["windows"] > 4 and (ratio := _against_full(case))]
    exact = [ratio for case in cases if case["windows"] <= 1 and (ratio := _against_full(case))]
    lines.append(_line("`auto`: time of full attention's beyond 4 windows", _FAR, max(far, default=None)))
    lines.append(_line("`auto`: time of full attention's where exact", _EXACT, max(exact, default=None)))
    return lines


def _line(what: str, wanted: float, got: float | None, *, at_least: bool = False, rest: list[str] | None = None) -> str:
    met = "not measured" if got is None else "met" if (got >= wanted if at_least else got <= wanted) else "missed"
    bound = f"at {'least' if at_least else 'most'} {wanted:g}"
    figure = "" if got is None else f"{got:.2f}"
    return "| " + " | ".join([what, bound, figure, met, *(rest or ["", "", ""])]) + " |"


def seconds(rows: Rows, who: str) -> float | None:
    """Median of one row; where FlashAttention-2 is not there (a dry run), the best full attention stands for it."""
    if who == ATEN and ATEN not in rows:
        return best_full(rows)
    found = rows.get(who, {})
    return median(found["seconds"]) if found.get("seconds") and "cannot" not in found else None


def best_full(rows: Rows) -> float | None:
    """Median of the fastest full attention."""
    times = [seconds(rows, who) for who, row in rows.items() if row["kind"] == "full"]
    return min((t for t in times if t), default=None)


def _against_full(case: dict[str, Any]) -> float | None:
    rows = case.get("rows", {})
    ours, theirs = seconds(rows, AUTO), best_full(rows)
    return ours / theirs if ours and theirs else None


def table(found: dict[str, Any]) -> list[str]:
    """Times, memory and errors of a section's candidates, with what peers published."""
    rows, lines = found["rows"], []
    lines += [
        "| who | ms | range | times best full | GiB | first call s | errors (at most 1) |",
        "| --- " * 7 + "|",
    ]
    best = best_full(rows)
    for name, row in rows.items():
        if "cannot" in row or not row["seconds"]:
            lines.append(f"| {name} | cannot: {row.get('cannot', 'unfinished')} | | | | | |".replace("\n", " "))
            continue
        ms = [1e3 * s for s in row["seconds"]]
        times = f"{1e3 * best / median(ms):.2f}" if best and row["kind"] in ("blocks", "peer") else ""
        errors = ", ".join(f"{what} {value:.2f}" for what, value in row.get("errors", {}).items())
        memory = f"{row['bytes'] / 2**30:.2f}" if "bytes" in row else ""
        lines.append(
            f"| {name} | {median(ms):.1f} | {min(ms):.1f} to {max(ms):.1f} | {times} | {memory} | "
            f"{row['first_seconds']:.1f} | {errors} |"
        )
    if "published" in found:
        said = found["published"]
        lines.append(
            f"| *published, not measured here: {said['who']}* | | | *{said['times']:g}* | | | "
            f"*{said['hardware']}; {said['source']}* |"
        )
    return lines


def where(found: dict[str, Any]) -> list[str]:
    """What each pass of the Triton backend took, beside what it does and the least it can take."""
    floor, took = found["floor"], found.get("parts", {})
    lines = ["", f"Passes of `triton`, floors by the data sheet of an {found['peak']}:", ""]
    lines += ["| pass | tensor TFLOP | GB | floor ms | ms | share of floor |", "| --- " * 6 + "|"]
    for name, least in floor.items():
        counted = f"{least['operations'] / 1e12:.2f} | {least['bytes'] / 1e9:.1f} | {1e3 * least['seconds']:.2f}"
        ms = took.get(name)
        measured = f"{1e3 * ms:.2f} | {least['seconds'] / ms:.0%}" if ms else " | "
        lines.append(f"| {name} | {counted} | {measured} |")
    if "all" in took:
        rest = 2 * took["all"] - sum(took.values())
        lines.append(f"| what no pass took | | | | {1e3 * rest:.2f} | |")
    return lines


def auto(cases: list[dict[str, Any]]) -> list[str]:
    """What ``auto`` took at each length."""
    lines = ["| shape | windows | took | full ms | auto ms | auto / full | triton ms | |", "| --- " * 8 + "|"]
    for case in cases:
        rows = case.get("rows", {})
        cells = [f"{1e3 * t:.2f}" if t else "" for t in (best_full(rows), seconds(rows, AUTO), seconds(rows, TRITON))]
        ratio, most = _against_full(case), _EXACT if case["windows"] <= 1 else _FAR if case["windows"] > 4 else None
        met = "" if most is None or ratio is None else "met" if ratio <= most else "missed"
        why = case.get("cannot") or rows.get(AUTO, {}).get("cannot", "")
        lines.append(
            f"| {case['shape']} | {case['windows']:.2f} | {case['took']} | {cells[0]} | {cells[1]} | "
            f"{'' if ratio is None else f'{ratio:.2f}'} | {cells[2]} | {met or why} |"
        )
    return lines
