"""The checks of tests/support/browser.py must be able to fail."""

from __future__ import annotations

import pytest
from browser import open_page, overflow

GOOD = '<!doctype html><meta charset="utf-8"><title>x</title><p>word</p>'


def write(directory, body):
    path = directory / "page.html"
    path.write_text(GOOD + body)
    return path


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<script>console.error('broken')</script>", "broken"),
        ("<script>undefinedFunction()</script>", "undefinedFunction"),
        ('<img src="other.png" alt="">', "asked for file:"),
    ],
)
def test_a_bad_page_fails(browser, tmp_path, body, message):
    with pytest.raises(AssertionError, match=message), open_page(browser, write(tmp_path, body)):
        pass


def test_overflow(browser, tmp_path):
    with open_page(browser, write(tmp_path, "")) as page:
        assert overflow(page) == []
    with open_page(browser, write(tmp_path, '<div style="width: 2000px">x</div>')) as page:
        assert [found.split()[0] for found in overflow(page)] == ["page"]
    with open_page(
        browser, write(tmp_path, '<svg width="40" height="20"><text y="10">too long a text</text></svg>')
    ) as page:
        assert overflow(page) == ["svg text too long a text"]
