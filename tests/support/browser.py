"""A real browser for tests of pages: Chromium without a window, driven by Playwright.

A test takes the fixture `browser` and calls `with open_page(browser, path) as page:`. Nothing is downloaded: without a
Chromium on the machine such tests skip.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE = 120_000  # ms, on a machine that does much else
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# The width that the document needs beyond the window, and the texts of an SVG that stick out of it.
OVERFLOW = """() => {
  const found = [];
  const root = document.scrollingElement;
  if (root.scrollWidth > root.clientWidth) found.push(`page ${root.scrollWidth} > ${root.clientWidth}`);
  for (const text of document.querySelectorAll("svg text")) {
    const svg = text.ownerSVGElement.getBoundingClientRect(), box = text.getBoundingClientRect();
    if (svg.width && (box.left < svg.left - 1 || box.right > svg.right + 1 ||
        box.top < svg.top - 1 || box.bottom > svg.bottom + 1)) found.push(`svg text ${text.textContent}`);
  }
  for (const node of document.querySelectorAll("button, label, h1, h2, p, li, dd, option, output, td, th")) {
    if (node.scrollWidth > node.clientWidth + 1 && getComputedStyle(node).display !== "inline")
      found.push(`${node.tagName} ${node.textContent.trim().slice(0, 40)}`);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    """A Chromium that a module's tests share; skips where there is none.

    Not for the whole session: while Playwright runs, no other event loop can start in this thread.
    """
    executable = next((path for name in NAMES if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no browser on the PATH ({', '.join(NAMES)}); install chromium to run the tests of pages")
    from playwright.sync_api import sync_playwright  # its import starts nothing, but takes time

    with sync_playwright() as playwright:
        # Containers often lack the name spaces and the shared memory that Chromium asks for.
        instance = playwright.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
            timeout=PATIENCE,
        )
        yield instance
        instance.close()


@contextlib.contextmanager
def open_page(browser, path: Path, fragment: str = "", width: int = 1280, height: int = 900, **options) -> Iterator:
    """A Playwright page with the file opened in it, in a context of its own.

    Options are those of `new_context`, for instance `color_scheme="dark"`. When the block ends, fails if the page wrote
    an error or a warning to the console, raised one, or asked for anything but the file itself.
    """
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    context.set_default_timeout(PATIENCE)
    complaints: list[str] = []
    address = Path(path).resolve().as_uri()

    def watch(request) -> None:
        if request.url.split("#")[0] != address and not request.url.startswith("data:"):
            complaints.append(f"asked for {request.url}")

    try:
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", watch)
        page.goto(address + fragment)
        yield page
        if complaints:
            raise AssertionError("; ".join(complaints))
    finally:
        context.close()


def overflow(page) -> list[str]:
    """What is wider than its place: the page itself, texts of its SVGs, blocks of text. [] when all fits."""
    return page.evaluate(OVERFLOW)
