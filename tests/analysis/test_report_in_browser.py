"""report.html of tools/analyze_trajectory.py in a real browser."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from browser import open_page, overflow
from synthetic_runs import write_run

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "analyze_trajectory.py")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    runs = [
        write_run(root / "base", seed=1),
        write_run(root / "a-condition-with-a-long-name", weight=0.015, uas_gain=0.0),
    ]
    before = sys.argv
    sys.argv = [TOOL, *map(str, runs), "--output", str(root / "out")]
    try:
        runpy.run_path(TOOL)["main"]()
    finally:
        sys.argv = before
    return root / "out" / "report.html"


@pytest.mark.parametrize("width", [1280, 400])
def test_report(browser, report, width):
    """No complaint in the console, nothing loaded, nothing wider than its place, and the figure is there."""
    with open_page(browser, report, width=width) as page:
        for summary in page.locator("summary").all():
            summary.click()
        assert overflow(page) == []
        broken = "images => images.filter(i => !i.complete || !i.naturalWidth).length"
        assert page.locator("img").count() >= 1
        assert page.eval_on_selector_all("img", broken) == 0
