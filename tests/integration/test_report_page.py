"""The page of a report in a real browser: nothing goes wrong in it, and it fits a phone, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from made_runs import NOW, Made

from raylaunch.observe.report import page
from raylaunch.observe.report.gather import gather

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FRAME = """<!doctype html><body style="margin:0"><iframe id="frame" style="border:0" width="{width}" height="900" srcdoc="{page}">
</iframe><pre id="look"></pre><script>document.getElementById("frame").addEventListener("load", event => {{
  const inside = event.target.contentWindow, page = inside.document, right = e => e.getBoundingClientRect().right;
  const wide = [...page.querySelectorAll("body *")].filter(e => !e.closest("svg, .scroll") && right(e) > inside.innerWidth + 1);
  document.getElementById("look").textContent = JSON.stringify({{
    width: inside.innerWidth, content: page.documentElement.scrollWidth, wide: wide.map(e => e.tagName + "." + e.className),
    back: inside.getComputedStyle(page.body).backgroundColor,
    charts: [...page.querySelectorAll("svg")].map(e => e.getBoundingClientRect().width),
    curves: page.querySelectorAll("path.line").length,
  }});
}})</script></body>"""


def chromium(path: Path, width: int, scheme: int) -> tuple[str, str]:
    """(the page when it is loaded, what the browser said). `scheme`: 0 dark, 1 light."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},900",
        f"--user-data-dir={path}.browser", f"--blink-settings=preferredColorScheme={scheme}",
        "--disable-background-networking", "--enable-logging=stderr", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def look(path: Path, text: str, width: int, scheme: int) -> dict[str, Any]:
    """What a script finds that has the page in a frame of this width: a browser's own window is 500 wide at least."""
    path.write_text(FRAME.format(width=width, page=html.escape(text)))
    shown, _ = chromium(path, 1300, scheme)
    match = re.search(r'<pre id="look"[^>]*>(.*?)</pre>', shown, re.DOTALL)
    assert match is not None
    found: dict[str, Any] = json.loads(match[1])
    return found


@pytest.mark.timeout(180)
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    run = Made(
        tmp_path, "a-rather-long-name-of-a-run-with-no-place-to-break.2026-11", 3000.0, 12, 2, 9, 3.0, 20
    ).write()
    text = page.render(gather(run, now=NOW + 100))
    plain = tmp_path / "plain.html"
    plain.write_text(text)
    shown, said = chromium(plain, 1180, 1)
    assert "CONSOLE" not in said, said
    assert "a-rather-long-name" in shown and "Where the time went" in shown
    phone = look(tmp_path / "phone.html", text, 390, 0)
    assert phone["content"] <= phone["width"] == 390 and phone["wide"] == []
    assert phone["curves"] >= 5 and all(0 < width <= phone["width"] for width in phone["charts"])
    desk = look(tmp_path / "desk.html", text, 1180, 1)
    assert desk["content"] <= desk["width"] == 1180 and desk["wide"] == []
    assert desk["back"] != phone["back"]  # dark, and light
