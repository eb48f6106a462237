"""The built documentation in a headless browser, without a network: ``make test-docs``.

Every page is opened at the width of a desk and of a telephone. Needs Chromium on the path, or its path in ``CHROMIUM``.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
HTML = ROOT / "docs" / "_build" / "html"
PAGES = sorted(path.relative_to(HTML).as_posix() for path in HTML.rglob("*.html"))
WIDTHS = (1300, 400)
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
SCROLLING = {"compatibility.html", "encoder_quality.html", "robustness.html"}
"""Pages with a table wider than a page, which has to be scrolled."""
FAULTS = r"""
async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const faults = [];
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 1) faults.push(`the page is ${wide} pixels too wide`);
  for (const image of document.images) {
    image.loading = "eager";
    if (!image.complete) await new Promise(done => { image.onload = image.onerror = done; });
    if (image.naturalWidth === 0) faults.push(`missing image ${image.src}`);
  }
  const scrolls = element => {
    for (; element && element.tagName !== "ARTICLE"; element = element.parentElement)
      if (["auto", "scroll"].includes(getComputedStyle(element).overflowX)) return true;
    return false;
  };
  const article = document.querySelector("article");
  if (article) {
    const right = article.getBoundingClientRect().right + 10;  // the margin of headings
    for (const part of article.querySelectorAll("table, pre, img, svg, mjx-container, dl, p, h1, h2, h3"))
      if (part.getBoundingClientRect().right > right && !scrolls(part))
        faults.push(`clipped ${part.tagName}: ${part.textContent.slice(0, 60)}`);
    const text = article.cloneNode(true);
    for (const code of text.querySelectorAll("code, pre, script, style, mjx-container")) code.remove();
    if (window.innerWidth > 1000)  // on a telephone they scroll
      for (const box of article.querySelectorAll(".cell_output pre, .cell_output .text_html, .table-wrapper"))
        if (box.scrollWidth > box.clientWidth + 2)
          faults.push(`cut ${box.tagName}, ${box.scrollWidth} pixels: ${box.textContent.trim().slice(0, 60)}`);
    const raw = text.textContent.match(/\\\(|\\\[|\$\$|\\(frac|mathbb|mathcal|sum|log|begin|phi)\b/);
    if (raw) faults.push(`raw TeX: ${text.textContent.slice(Math.max(0, raw.index - 30), raw.index + 50)}`);
    for (const error of article.querySelectorAll("mjx-merror, [data-mjx-error]"))
      faults.push(`TeX error: ${error.textContent.slice(0, 60)}`);
  }
  return faults;
}
"""

pytestmark = pytest.mark.site
api = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.fail("no Chromium on the path; install one, or set CHROMIUM to its path")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def faults(browser: Any, width: int, url: str) -> list[str]:
    """What is wrong with a page, seen at a width."""
    page, found = browser.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: found.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("requestfailed", lambda request: found.append(f"not loaded: {request.url}"))
    page.route(lambda url: not url.startswith(("file:", "data:", "blob:", "about:")), lambda route: route.abort())
    page.goto(url)
    found += page.evaluate(FAULTS)
    if folder := os.environ.get("SCREENSHOTS"):
        name = url.removeprefix(f"{HTML.as_uri()}/").replace("/", "_")
        page.screenshot(path=f"{folder}/{name}_{width}.png", full_page=True)
    page.close()
    return found


def test_the_site_is_built() -> None:
    assert len([page for page in PAGES if not page.startswith("_modules")]) > 40, "run make docs first"


@pytest.mark.parametrize("name", PAGES)
def test_page(browser: Any, name: str) -> None:
    url = (HTML / name).as_uri()
    found = {width: faults(browser, width, url) for width in WIDTHS}
    if name in SCROLLING:
        found = {width: [fault for fault in own if not fault.startswith("cut ")] for width, own in found.items()}
    assert {width: own for width, own in found.items() if own} == {}


def test_faults_are_found(browser: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<article style='width: 300px'><p>\\(x\\)</p><img src='none.png'><img src='https://example.invalid/x.png'>"
        "<pre style='width: 2000px'>wide</pre></article><script>throw Error('no')</script>"
    )
    found = " | ".join(faults(browser, 400, bad.as_uri()))
    for fault in ("raw TeX", "missing image", "not loaded: https", "too wide", "clipped PRE", "script: no"):
        assert fault in found
