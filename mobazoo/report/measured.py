"""Parts of the page about probes, recall and tasks of lm-eval."""

from __future__ import annotations

from html import escape
from typing import Any

from mobazoo.config.recipe import to_yaml
from mobazoo.eval.tables import harness_rows
from mobazoo.probe.tables import chosen_setting, grid_rows, layer_rows
from mobazoo.report.collect import Findings
from mobazoo.report.gallery import Gallery
from mobazoo.report.html import more, paragraph, section, table


def probes(findings: Findings, gallery: Gallery) -> list[str]:
    """What blocks would keep of full attention, and the rules that a probe suggests."""
    parts = []
    for name, found in findings.of("probe").items():
        chosen = chosen_setting(found)
        setting = f"blocks of {chosen['block_size']}, top {chosen['top_k']}"
        header, rows = layer_rows(found, chosen)
        said = "; ".join(f"layer {row[0]}: {row[1]}" for row in rows)
        caption = (
            f"Percent of full attention that a query's own block and the blocks it would choose hold, {setting}, over "
            f"{found['texts']['count']} texts of {found['texts']['length']} tokens."
        )
        plot = gallery.plots.mass_by_head(chosen["layers"], f"probe-{name}")
        parts.append(
            section(
                "Attention that blocks would keep",
                gallery.figure(plot, f"Heat map of attention kept by layer and head. {said}.", caption),
                more("the numbers", table(header, rows), table(*grid_rows(found))),
            )
        )
        if "suggested" in found:
            parts.append(_suggested(found["suggested"], setting, gallery, f"layers-{name}"))
    return parts


def _suggested(suggested: Any, setting: str, gallery: Gallery, name: str) -> str:
    said = "; ".join(f"layer {i}: {one['mean']:+.4f}" for i, one in enumerate(suggested["layers"]))
    caption = f"One layer at a time reads {setting}; hatched: the layers that the suggested rules leave full."
    drawn = gallery.figure(
        gallery.plots.loss_by_layer(suggested, name), f"Bars of loss change by layer. {said}.", caption
    )
    trust = suggested["trust"]
    rules = f"<pre>{escape(to_yaml({'attention': suggested['rules']}).rstrip())}</pre>"
    return section("Which layers to leave full", drawn, rules, paragraph(f"Trust: {trust['level']}; {trust['why']}."))


def recalls(findings: Findings, gallery: Gallery) -> list[str]:
    """What was found in long texts, by length and depth."""
    parts = []
    for name, found in findings.of("recall").items():
        settings = found["settings"]
        rows = [
            (
                setting,
                cell["task"],
                str(cell["length"]),
                f"{cell['depth']:g}",
                f"{cell['score']['mean']:.2f}",
                f"{cell['loss']['mean']:.3f}",
            )
            for setting, cells in settings.items()
            for cell in cells
        ]
        means = [
            f"{setting} {100 * sum(cell['score']['mean'] for cell in cells) / len(cells):.0f} %"
            for setting, cells in settings.items()
        ]
        caption = f"Percent of {found['samples']} prompts a cell whose reply holds what was hidden."
        header = ("setting", "task", "tokens", "depth", "found", "loss of the answer")
        parts.append(
            section(
                "Found in long texts",
                gallery.figure(
                    gallery.plots.recall(settings, f"recall-{name}"),
                    f"Heat maps of what was found in long texts, by length and depth: {', '.join(means)}.",
                    caption,
                ),
                more("the numbers", table(header, rows)),
            )
        )
    return parts


def tasks(findings: Findings) -> list[str]:
    """Scores in tasks of lm-eval."""
    parts = []
    for found in findings.of("lm_eval").values():
        words = f"By lm-eval {found['version']}, with its standard errors."
        parts.append(section("Tasks of lm-eval", table(*harness_rows(found)), paragraph(words, "soft")))
    return parts
