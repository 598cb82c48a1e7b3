"""The page: whole, by itself, escaped, readable without seeing the plots."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from typer.testing import CliRunner

from mobazoo.cli import app
from mobazoo.config.report import ReportRecipe
from mobazoo.errors import InputError, UnsupportedError
from mobazoo.report import html
from mobazoo.report.collect import collect
from mobazoo.report.page import short_table, write_report
from mobazoo.report.plots import load, shares
from mobazoo.report.style import CSS, THEMES, VARIABLES
from tests.report.samples import HOSTILE, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run"))
    written, _ = write_report(ReportRecipe(str(folder)))
    assert written == [folder / "report.html", folder / "report-pictures"]
    return folder


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    return (run / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def tree(text: str) -> ElementTree.Element:
    """The page is XML too, so that a parser finds what does not close."""
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def local(tag: str) -> str:
    return tag.rpartition("}")[2]


def words(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def test_nothing_outside_is_referred_to(tree: ElementTree.Element, text: str) -> None:
    for element in tree.iter():
        assert local(element.tag) not in {"script", "link", "iframe", "object", "embed", "base", "form", "img"}
        for name, value in element.attrib.items():
            if local(name) in {"src", "href", "data", "action", "poster", "srcset"}:
                assert value.startswith(("#", "data:image/png;base64,")), (name, value[:60])
            assert not local(name).startswith("on")
            for target in re.findall(r"url\(([^)]*)\)", value):
                assert target.startswith("#")
    assert not re.search(r"url\(|@import|https?:", CSS)
    assert "<metadata" not in text


def test_ids_are_unique_and_every_reference_has_its_target(tree: ElementTree.Element, text: str) -> None:
    ids = [element.attrib["id"] for element in tree.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids)) > 10
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used
    assert used <= set(ids)


def test_what_comes_from_outside_is_escaped(text: str, tree: ElementTree.Element) -> None:
    assert HOSTILE not in text
    (mark,) = (element for element in tree.iter() if local(element.tag) == "mark")
    assert mark.text == HOSTILE


def test_colours_are_variables_with_a_light_and_a_dark_value(text: str) -> None:
    plots = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not [colour for colour in VARIABLES if colour in plots]
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert {"--series-0", "--series-1", "--ink"} <= used
    light, _, dark = CSS.partition("prefers-color-scheme: dark")
    for variable in used:
        assert f"{variable}: #" in light
        assert f"{variable}: #" in dark
    # A colour that matplotlib chose would not change with the page; black and white least of all.
    assert not re.search(r"(fill|stroke): (#|rgb|black|white)", plots)


def test_every_plot_says_what_it_shows(tree: ElementTree.Element) -> None:
    figures = [element for element in tree.iter() if element.tag == "figure"]
    assert len(figures) == 9
    for found in figures:
        (svg,) = (child for child in found if local(child.tag) == "svg")
        assert svg.attrib["role"] == "img"
        assert len(svg.attrib["aria-label"]) > 60
        assert "viewBox" in svg.attrib
        assert "width" not in svg.attrib
        (caption,) = (child for child in found if child.tag == "figcaption")
        assert len(words(caption)) > 40
    assert len({figure.attrib["aria-label"] for figure in tree.iter() if local(figure.tag) == "svg"}) == 9
    labels = {words(element) for found in figures for element in found.iter() if local(element.tag) == "text"}
    assert {"position in the text (tokens)", "loss (nats per token)", "prompt (tokens)"} <= labels
    assert {"time to read it (seconds)", "query (tokens)", "block of 64 tokens", "head 3", "16K"} <= labels
    assert {"query head", "layer", "95", "depth", "50 %", "needle, full", "tracking, moba"} <= labels
    assert {"length (tokens)", "forward (milliseconds)", "one token (milliseconds)", "MoBA, auto", "64K"} <= labels
    assert {"layer that is switched, alone", "loss change (nats per token)"} <= labels
    assert {"full, before", "moba, before", "full, after", "moba, after"} <= labels


def test_the_page_has_its_parts_in_order(tree: ElementTree.Element) -> None:
    titles = [words(element) for element in tree.iter() if element.tag == "h2"]
    assert titles == [
        "In short",
        "Attention that blocks would keep",
        "Which layers to leave full",
        "Loss by position",
        "Found in long texts",
        "Tasks of lm-eval",
        "Time to read a prompt",
        "Time of attention, forward",
        "Time of attention, one token",
        "How often blocks are read",
        "Blocks that layer 2 reads",
        "A text",
        "How it was made",
        "Where it was measured",
    ]
    page = words(tree)
    assert page.index("did before") < page.index("did after") < page.index("did prefill")
    assert "did report" not in page
    assert "attention: - layers: ':' pattern: moba block_size: 64 top_k: 3 - layers: 0 pattern: full" in page
    assert "Trust: high; it beats them." in page
    assert "mobazoo eval loss dest=before.json" in page


def test_the_short_table(run: Path) -> None:
    _, rows = short_table(collect(run))
    assert rows[:4] == [
        ("loss, before", "full", "4.500", ""),
        ("loss, before", "moba", "4.750", "+0.250 ± 0.010"),
        ("loss, after", "full", "4.200", ""),
        ("loss, after", "moba", "4.450", "+0.250 ± 0.010"),
    ]
    assert rows[5] == ("prefill, 16K", "moba", "0.96 s", "13.3 x faster")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_plot_is_a_picture_too(theme: str, run: Path) -> None:
    """In the page's colours: letters stand out from the paper behind them, and every curve from it too."""
    pictures = sorted((run / "report-pictures").glob(f"*-{theme}.png"))
    assert len(pictures) == 9
    ink, paper = (to_rgb(THEMES[theme][name]) for name in ("--ink", "--paper"))
    for picture in pictures:
        pixels = plt.imread(picture)[..., :3]
        assert 800 <= pixels.shape[1] <= 1100
        flat = pixels.reshape(-1, 3)
        assert (np.abs(pixels[0] - paper) < 0.01).all(), picture.name
        assert (np.abs(flat - ink).max(1) < 0.01).any(), picture.name
    curves = plt.imread(run / "report-pictures" / f"prefill-prefill-{theme}.png")[..., :3].reshape(-1, 3)
    for series in ("--series-0", "--series-1"):
        assert (np.abs(curves - to_rgb(THEMES[theme][series])).max(1) < 0.01).sum() > 100


def test_colours_have_the_contrast_that_wcag_asks_for() -> None:
    """4.5 for letters, 3 for curves, on the paper of their theme."""

    def light(colour: str) -> float:
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    for colours in THEMES.values():
        for name, colour in colours.items():
            high, low = sorted((light(colour), light(colours["--paper"])), reverse=True)
            if name == "--ink" or "series" in name:
                assert (high + 0.05) / (low + 0.05) >= (4.5 if name == "--ink" else 3), name


def test_block_load_by_hand() -> None:
    # Blocks of 2: queries 2 to 5 may read block 0, queries 4 and 5 block 1; the own block is nobody's choice.
    heads: list[list[list[int]]] = [[[], [], [0], [0], [0], [1]], [[], [], [], [0], [1], [1]]]
    assert load(heads, 2) == [4 / 8, 3 / 4]
    assert load([[[], []]], 2) == []


def test_tasks_of_lm_eval_stand_side_by_side(tree: ElementTree.Element) -> None:
    cells = "task metric samples full moba endings<b> acc 3 0.75 ± 0.25 0.75 ± 0.25"
    assert cells in " ".join(words(cell) for cell in tree.iter() if cell.tag in ("td", "th"))


def test_what_a_sweep_left_out_is_said(tree: ElementTree.Element) -> None:
    page = words(tree)
    assert page.count("what was left out") == 2
    assert "naive at 16K needs about 80 GiB, there are 20 GiB" in page
    assert "64 blocks, top 3, bfloat16; random inputs. Blocks touch 90 % of the causal tiles" in page


def test_shares_of_neighbours() -> None:
    # Blocks of 8, so two queries a row; eight queries of the second block, four of them read block 0.
    chosen: list[list[int]] = [[]] * 8 + [[0], [0], [0], [], [], [0], [], []]
    picture, blocks = shares(chosen, 8)
    assert blocks == 2
    np.testing.assert_array_equal(picture[:, 0], [0, 0, 0, 0, 1, 0.5, 0.5, 0])
    np.testing.assert_array_equal(picture[:, 1], 0)


def test_measurements_of_other_lengths_stand_side_by_side(tmp_path: Path) -> None:
    write_run(tmp_path)
    said = json.loads((tmp_path / "after.json").read_text())
    said["texts"] = {"count": 7, "length": 512}
    for setting in said["loss"]["settings"].values():
        setting["by_position"] = setting["by_position"][:4]
    (tmp_path / "after.json").write_text(json.dumps(said))
    text = write_report(ReportRecipe(str(tmp_path), pictures=False))[0][0].read_text()
    assert "40 texts of 1024 tokens, 7 texts of 512 tokens." in text
    found = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    (_, losses, *_) = (element for element in found.iter() if element.tag == "details")
    assert [len(list(table.iter("tr"))) for table in losses.iter("table")] == [9, 5]


def test_a_run_with_one_result_has_a_page_too(tmp_path: Path) -> None:
    write_run(tmp_path)
    for name in ("before", "after", "prefill", "probe", "recall", "sweep", "tasks"):
        (tmp_path / f"{name}.json").unlink()
    for stamp in (tmp_path / ".stages").iterdir():
        stamp.unlink()
    (path,), (_, rows) = write_report(
        ReportRecipe(str(tmp_path), str(tmp_path / "other" / "page.html"), "Words & more")
    )
    assert rows == []
    found = ElementTree.fromstring(path.read_text().removeprefix("<!DOCTYPE html>\n"))
    assert [words(element) for element in found.iter() if element.tag in ("h1", "h2")] == [
        "Words & more",
        "A text",
        "Where it was measured",
    ]


def test_a_stage_whose_time_nobody_knows(tmp_path: Path) -> None:
    """Its run was killed between result and stamp."""
    write_run(tmp_path)
    stamp = tmp_path / ".stages" / "01-eval.json"
    stamp.write_text(json.dumps({**json.loads(stamp.read_text()), "seconds": None}))
    ((page,), _) = write_report(ReportRecipe(str(tmp_path), pictures=False))
    assert "<td>unknown</td>" in re.sub(r"<td[^>]*>", "<td>", page.read_text())


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path)
    recipe = ReportRecipe(str(tmp_path), pictures=False)
    page = tmp_path / "report.html"
    page.write_text("<html>mine</html>")
    with pytest.raises(InputError, match=r"report\.html: exists and is no earlier result, so it is not replaced"):
        write_report(recipe)
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--dry-run"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert page.read_text() == "<html>mine</html>"
    page.write_text(html.page("An earlier one", "", ""))
    write_report(recipe)
    assert "An earlier one" not in page.read_text()


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="nothing: no such folder; want that of a run, or one with JSON results"):
        collect(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"holds no result; give eval, bench or generate a dest=\.\.\.\.json in it"):
        collect(tmp_path)
    write_run(tmp_path)
    stamp = tmp_path / ".stages" / "01-eval.json"
    stamp.write_text("{")
    with pytest.raises(
        InputError, match=r"01-eval\.json: not a stamp \(.*\); remove it; a stage that is not whole runs again"
    ):
        collect(tmp_path)
    stamp.write_text('{"verb": "eval"}')
    with pytest.raises(InputError, match=r"01-eval\.json: not a stamp of this version; remove it"):
        collect(tmp_path)
    stamp.unlink()
    monkeypatch.delitem(sys.modules, "mobazoo.report.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"report: needs matplotlib, .*; pip install 'mobazoo\[report\]'"):
        write_report(ReportRecipe(str(tmp_path)))
