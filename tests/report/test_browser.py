"""The page in a real browser, where one is installed: no errors, nothing wider than the screen, text to be read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from mobazoo.config.report import ReportRecipe
from mobazoo.report.page import write_report
from tests.report.samples import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# Appended to a copy of the page: what a reader at this width gets, as JSON in the document's title.
PROBE = """<script>
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
  const sizes = [...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height);
  const style = getComputedStyle(document.body);
  document.title = JSON.stringify({width: innerWidth, scroll: document.documentElement.scrollWidth, wide,
    smallest: Math.min(...sizes), plots: document.querySelectorAll('svg').length, ink: style.color,
    back: style.backgroundColor, short: document.querySelector('.scroll').scrollWidth
    <= document.querySelector('.scroll').clientWidth});
</script>"""


@pytest.mark.parametrize("width", [500, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_page_at_phone_and_desk_width(width: int, dark: bool, tmp_path: Path) -> None:
    # Headless Chromium's window is at least 500 wide; the frame below makes it a phone.
    (page,), _ = write_report(ReportRecipe(str(write_run(tmp_path / "run")), pictures=False))
    (tmp_path / "probed.html").write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    target, shown = tmp_path / "probed.html", width
    if width == 500:
        shown = 390
        target = tmp_path / "frame.html"
        target.write_text(
            '<!DOCTYPE html><iframe id="f" src="probed.html" style="width:390px;height:800px;border:0"></iframe>'
            "<script>f.onload = () => { document.title = f.contentDocument.title }</script>"
        )
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width},900",
        "--virtual-time-budget=3000",
        *(["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []),
        "--dump-dom",
        target.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stdout[:500]
    found = json.loads(unescape(title[1]))
    assert found["width"] == shown
    assert found["wide"] == []
    assert found["scroll"] <= shown
    assert found["plots"] == 9
    assert found["short"]  # the first table needs no scrolling
    assert found["smallest"] >= 10
    assert (found["ink"], found["back"]) == (
        ("rgb(230, 233, 238)", "rgb(15, 18, 22)") if dark else ("rgb(28, 32, 38)", "rgb(244, 245, 247)")
    )
