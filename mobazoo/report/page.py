"""The page about a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mobazoo.config.recipe import to_yaml
from mobazoo.config.report import ReportRecipe
from mobazoo.files import check_place, write_whole
from mobazoo.report.collect import Findings, collect
from mobazoo.report.gallery import Gallery
from mobazoo.report.html import is_page, length_label, more, page, paragraph, section, table
from mobazoo.report.measured import probes, recalls, tasks
from mobazoo.report.style import CSS
from mobazoo.report.times import prefills, sweeps

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def write_report(recipe: ReportRecipe) -> tuple[list[Path], Table]:
    """Writes the page and its plots as pictures; returns the page's path, the pictures' folder and a short table.

    Raises:
        InputError: a folder without results, or a place that cannot be written or holds another file.
        UnsupportedError: matplotlib is not installed.
    """
    recipe.require()
    folder = Path(recipe.run).expanduser()
    findings, gallery = collect(folder), Gallery()
    dest = recipe.page()
    check_place(dest, is_page)
    write_whole(dest, render(findings, recipe.title, gallery))
    pictures = dest.parent / f"{dest.stem}-pictures"
    if recipe.pictures:
        gallery.write(pictures)
    return [dest, *([pictures] if recipe.pictures and gallery.shown else [])], short_table(findings)


def render(findings: Findings, title: str, gallery: Gallery) -> str:
    """The page as text."""
    parts = [_head(findings, title), _short(findings), '<div class="grid">']
    parts += [*probes(findings, gallery), _losses(findings, gallery), *recalls(findings, gallery)]
    parts += tasks(findings)
    parts += [*prefills(findings, gallery), *sweeps(findings, gallery), *_choices(findings, gallery)]
    parts += [*_texts(findings), "</div>", _stages(findings), _machine(findings)]
    return page(title, CSS, "".join(parts))


def short_table(findings: Findings) -> Table:
    """What everything comes to, in one table."""
    header = ("measured", "with", "value", "difference")
    rows: list[tuple[str, ...]] = []
    for name, loss in findings.of("loss").items():
        first = next(iter(loss["settings"]))
        for setting, said in loss["settings"].items():
            against = "" if setting == first else _with_error(said["difference"], "+.3f")
            rows.append((f"loss, {name}", setting, f"{said['mean']['mean']:.3f}", against))
    for prefill in findings.of("prefill").values():
        row = prefill[-1]
        where = f"prefill, {length_label(row['length'])}"
        rows.append((where, "full", f"{row['full_median_s']:.2f} s", ""))
        rows.append((where, "moba", f"{row['moba_median_s']:.2f} s", f"{row['speedup']:.1f} x faster"))
    return header, rows


def _head(findings: Findings, title: str) -> str:
    machine = next(iter(findings.results.values()))["machine"]
    commands = dict.fromkeys(result["command"] for result in findings.results.values())
    said = "".join(f"<code>{escape(command)}</code> " for command in commands)
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['date']}"
    return f'<header><h1>{escape(title)}</h1><p class="soft">{said}</p>{paragraph(where, "soft")}</header>'


def _short(findings: Findings) -> str:
    header, rows = short_table(findings)
    if not rows:
        return ""
    words = (
        "Loss is the mean over validation texts, in nats per token. The difference is to the first setting of the same "
        "measurement, text by text, with its standard error. Prefill is the time to read a prompt."
    )
    return section("In short", table(header, rows), paragraph(words, "soft"))


def _losses(findings: Findings, gallery: Gallery) -> str:
    losses = findings.of("loss")
    if not losses:
        return ""
    tables, curves, texts = [], [], []
    for name, loss in losses.items():
        settings = loss["settings"]
        runs = zip(*(said["by_position"] for said in settings.values()), strict=True)
        rows = [
            (f"{run[0]['first']}-{run[0]['last']}", *(_with_error(bucket["loss"]) for bucket in run)) for run in runs
        ]
        tables += [paragraph(name), table(("positions", *settings), rows)]
        ends = zip(settings, rows[0][1:], rows[-1][1:], strict=True)
        curves += [f"{setting}, {name}: {first} to {last}" for setting, first, last in ends]
        said = findings.results[name]["texts"]
        texts.append(f"{said['count']} texts of {said['length']} tokens")
    caption = (
        f"{', '.join(dict.fromkeys(texts))}. Where a curve falls, later tokens profit from what was read before. A gap "
        "between the settings of one measurement is what block attention costs there."
    )
    plot = gallery.plots.loss_by_position(losses, "loss")
    return section(
        "Loss by position",
        gallery.figure(plot, f"Line plot of loss by position, first to last. {'; '.join(curves)}.", caption),
        more("the numbers, with standard errors", *tables),
    )


def _choices(findings: Findings, gallery: Gallery) -> list[str]:
    parts = []
    for name, choices in findings.of("choices").items():
        where = f"Setting {choices['setting']}, {name}; the text is {choices['text']}."
        for size in dict.fromkeys(layer["block_size"] for layer in choices["layers"]):
            some = [layer for layer in choices["layers"] if layer["block_size"] == size]
            parts.append(_load(some, size, f"load-{name}-{size}", where, gallery))
        for layer in choices["layers"]:
            number, size = layer["layer"], layer["block_size"]
            caption = (
                f"{where} A query down the side reads its own block (orange) and the blocks the gate picks for it "
                "(blue, fuller where more of its neighbours pick it)."
            )
            alternative = f"Heat map by head of which blocks of {size} tokens the queries of layer {number} read."
            plot = gallery.plots.block_choices(layer, f"choices-{name}-{number}")
            parts.append(section(f"Blocks that layer {number} reads", gallery.figure(plot, alternative, caption)))
    return parts


def _load(layers: Sequence[Mapping[str, Any]], size: int, name: str, where: str, gallery: Gallery) -> str:
    rows = []
    for layer in layers:
        shares = gallery.plots.load(list(layer["heads"].values()), size)
        most = max(range(len(shares)), key=shares.__getitem__)
        rows.append((str(layer["layer"]), str(most), *(f"{100 * x:.0f} %" for x in (max(shares), min(shares)))))
    said = "; ".join(f"layer {row[0]}: block {row[1]} most, {row[2]}, the least {row[3]}" for row in rows)
    caption = f"{where} Percent of the queries behind a block, over the heads shown, that pick it."
    header = ("layer", "most read", "by", "least read by")
    drawn = gallery.figure(gallery.plots.block_load(layers, name), f"Heat map of block load by layer. {said}.", caption)
    return section("How often blocks are read", drawn, more("the numbers", table(header, rows)))


def _texts(findings: Findings) -> list[str]:
    parts = []
    for said in findings.of("generate").values():
        text = f"<pre>{escape(said['prompt'])}<mark>{escape(said['text'])}</mark></pre>"
        how = f"{said['new_tokens']} tokens, coloured, after {said['prompt_tokens']}, in {said['seconds']:.1f} s."
        parts.append(section("A text", text, paragraph(how, "soft")))
    return parts


def _stages(findings: Findings) -> str:
    if not findings.stages:
        return ""
    rows = [
        (str(i), stage["verb"], "unknown" if stage["seconds"] is None else f"{stage['seconds']:.1f}", stage["line"])
        for i, stage in enumerate(findings.stages, 1)
    ]
    commands = "\n".join(stage["command"] for stage in findings.stages)
    recipes = "\n".join(f"# {stage['command']}\n{to_yaml(stage['recipe'])}" for stage in findings.stages)
    return section(
        "How it was made",
        table(("stage", "verb", "seconds", "result"), rows),
        more("the commands", f"<pre>{escape(commands)}</pre>"),
        more("the recipes, resolved", f"<pre>{escape(recipes)}</pre>"),
    )


def _machine(findings: Findings) -> str:
    machines = [result["machine"] for result in findings.results.values()]
    keys = list(dict.fromkeys(key for machine in machines for key in machine))
    rows = [(key, ", ".join(dict.fromkeys(machine.get(key, "") for machine in machines))) for key in keys]
    return section("Where it was measured", table(("what", "is"), rows))


def _with_error(said: Mapping[str, Any], digits: str = ".3f") -> str:
    return f"{said['mean']:{digits}}" + ("" if said["error"] is None else f" ± {said['error']:.3f}")
