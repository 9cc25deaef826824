"""The documentation site builds without warnings, has no broken links, and renders correctly.

Rendering is tested in headless Chromium, if it and the extra ``browser`` are installed.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import pytest

from dfkd_fast import compat

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=repository,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},  # silences the theme's notice
        capture_output=True,
        text=True,
        timeout=200,
    )
    output = built.stdout + built.stderr
    assert built.returncode == 0, output
    assert "WARNING" not in output
    return folder


class Page(HTMLParser):
    """Links, fetched resources and anchors of an HTML file."""

    FETCHED = frozenset({"stylesheet", "icon", "preload", "prefetch", "modulepreload", "preconnect", "dns-prefetch"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.anchors: set[str] = {"", "top"}
        self.unresolved: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attributes}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if tag == "link" and set(values.get("rel", "").split()) & self.FETCHED:
            self.fetched.add(values["href"])
        if tag != "a":
            self.fetched |= {values[key] for key in ("src", "data", "poster") if values.get(key)}
            self.fetched |= {part.split()[0] for part in values.get("srcset", "").split(",") if part.strip()}
        self.fetched |= set(_urls(values.get("style", "")))


def _urls(css: str) -> list[str]:
    """URLs that a style sheet loads."""
    found = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", css)
    return [a or b for a, b in found]


def _elsewhere(address: str) -> bool:
    return bool(urlsplit(address).netloc) or urlsplit(address).scheme in ("http", "https")


def broken(folder: Path, pages: dict[Path, Page]) -> list[str]:
    """Internal links without a target, and external links that are not https addresses."""
    wrong = []
    for path, page in pages.items():
        here = "/" + path.relative_to(folder).as_posix()
        for link in page.links | page.fetched:
            target = urlsplit(urljoin(here, link))
            if target.scheme == "data":
                continue
            if _elsewhere(link):
                if target.scheme != "https" or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", target.netloc):
                    wrong.append(f"{here}: {link} is not an https address")
                continue
            file = folder / unquote(target.path).lstrip("/")
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file():
                wrong.append(f"{here}: {link} has no target")
            elif target.fragment and file in pages and unquote(target.fragment) not in pages[file].anchors:
                wrong.append(f"{here}: {link} has no such anchor")
    return wrong


def fetched_elsewhere(folder: Path, pages: dict[Path, Page]) -> list[str]:
    """Resources that a page loads from another host."""
    wrong = [f"{path.name}: {each}" for path, page in pages.items() for each in page.fetched if _elsewhere(each)]
    for path in folder.rglob("*.css"):
        wrong += [f"{path.name}: {each}" for each in _urls(path.read_text()) if _elsewhere(each)]
    return wrong


def test_build_links_and_content(site):
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 20
    assert not broken(site, pages)
    assert not fetched_elsewhere(site, pages)
    for path in pages:
        text = path.read_text()
        assert "arithmatex" not in text, f"{path.name} has a formula that is not MathML"
        assert not re.search(r":(?:func|class|mod|data|meth|attr):", text), f"{path.name} shows docstring markup"
    assert "<math" in (site / "method.html").read_text()
    swapping = (site / "swapping.html").read_text()
    assert swapping.count("argparse") >= 4, "the scripts of examples/ are not included"
    for module in compat.MODULES:
        assert f"dfkd_fast.compat.{module}" in swapping


def test_broken_links_are_found(tmp_path):
    (tmp_path / "index.html").write_text(
        '<h1 id="here"></h1><a href="#here"></a><a href="#there"></a><a href="other.html"></a>'
        '<a href="http://a.example"></a><a href="https://a.example/x"></a><img src="//cdn.example/x.png">'
        '<p style="background: url(https://b.example/y)"></p>'
    )
    (tmp_path / "style.css").write_text('@import "https://fonts.example/f.css"; p { background: url("x.png") }')
    pages = {path: Page(path.read_text()) for path in tmp_path.glob("*.html")}
    assert sorted(line.split()[1] for line in broken(tmp_path, pages)) == [
        "#there",
        "//cdn.example/x.png",
        "http://a.example",
        "other.html",
    ]
    assert len(fetched_elsewhere(tmp_path, pages)) == 3


# Overlapping text: rectangles of all visible lines, clipped by their scrolling ancestors.
OVERLAPS = """
() => {
  const boxes = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.data.trim() || parent.closest("script, style, noscript, template")) continue;
    if (!parent.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
    const whole = parent.closest("math") || node;  // parts of a formula may touch
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects()) {
      let {left, right, top, bottom} = rect;
      for (let up = parent; up && up !== document.documentElement; up = up.parentElement) {
        const style = getComputedStyle(up);
        if (style.clip === "rect(0px, 0px, 0px, 0px)") { right = left; break; }
        if (style.overflowX === "visible" && style.overflowY === "visible") continue;
        const frame = up.getBoundingClientRect();
        left = Math.max(left, frame.left); right = Math.min(right, frame.right);
        top = Math.max(top, frame.top); bottom = Math.min(bottom, frame.bottom);
      }
      if (right - left < 2 || bottom - top < 2 || right < 0) continue;
      boxes.push({left, right, top, bottom, whole, text: node.data.trim().slice(0, 40)});
    }
  }
  boxes.sort((a, b) => a.top - b.top);
  const found = [];
  for (let i = 0; i < boxes.length; i++) {
    for (let j = i + 1; j < boxes.length && boxes[j].top < boxes[i].bottom; j++) {
      const a = boxes[i], b = boxes[j];
      if (a.whole === b.whole) continue;
      const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const height = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      // Boxes of neighboring lines in different fonts may share a pixel or two.
      if (width > 2 && height > Math.min(a.bottom - a.top, b.bottom - b.top) / 3) found.push(`${a.text} | ${b.text}`);
    }
  }
  return found;
}
"""


# Requested before `site`, so that the site is not built if there is no browser.
@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="the extra 'browser' is not installed")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    arguments += ["--disable-background-networking", "--disable-component-update"]
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def address(browser: Any, site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Do not log requests."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("width", [390, 1440])
def test_rendering_in_chromium(browser, site, address, width):
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("request", lambda request: request.url.startswith((address, "data:")) or wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    page.on("response", lambda response: response.status < 400 or wrong.append(f"{response.url} is {response.status}"))
    for path in sorted(site.rglob("*.html")):
        name = path.relative_to(site).as_posix()
        page.goto(f"{address}/{name}", wait_until="load")
        scroll_width = page.evaluate("document.documentElement.scrollWidth")
        if scroll_width > width:
            wrong.append(f"{name}: {scroll_width} pixels wide")
        wrong += [f"{name}: {each}" for each in page.evaluate(OVERLAPS)]
        images = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)")
        wrong += [f"{name}: {each} is not shown" for each in images]
    assert not wrong


def test_search_finds_an_op(browser, address):
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.goto(f"{address}/index.html", wait_until="load")
    page.locator("[data-md-component=search-query]").click()
    page.keyboard.type("max_unpool2x2")
    page.locator(".md-search-result a[href*='max_pool2x2']").first.wait_for(timeout=20_000)
