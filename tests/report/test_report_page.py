"""The page of a whole sweep, in a real browser, and the figures that only measured sweeps have."""

import json

import numpy as np
import pytest
from browser import open_page, overflow
from synthetic_runs import write_glue, write_run, write_sweep
from trajectory_files import write_trajectory

from megatron_sas.report.analyse import Analysis
from megatron_sas.report.figures.heads import draw_heads, half_way
from megatron_sas.report.figures.style import mean_curve
from megatron_sas.report.load import read_inputs
from megatron_sas.report.report import write_analysis
from megatron_sas.report.trajectories import Curve

CONDITIONS = {
    "base": {},
    "a-condition-with-quite-a-long-name-and-λ": {"weight": 0.02, "uas_gain": 0.0, "blimp_gain": 0.0, "loss_gain": 0.5},
    "plus": {"weight": -0.02, "loss_gain": 1.0},
    "release-200": {"weight": 0.02, "release": 200},
    "release-600": {"weight": 0.02, "release": 600, "loss_gain": 1.1},
    "permuted": {"weight": 0.02, "heads": "permuted"},
}


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    for name, options in CONDITIONS.items():
        for seed in (1, 2):
            run = write_run(root / name / f"seed-{seed}", seed=seed, every=100, **options)
            onset = 3000 if options.get("uas_gain") == 0.0 else 380 + 10 * seed
            write_trajectory(run, onset=onset, steps=range(0, 901, 100), pairs=40, edges=200)
            if name in ("base", "plus"):
                write_glue(run, cola=0.1 * seed)
    write_sweep(root, dict.fromkeys(CONDITIONS), seeds=(1, 2))
    runs, notes = read_inputs([root])
    return Analysis(runs, 100, replicates=50, notes=notes)


@pytest.fixture(scope="module")
def output(analysis, tmp_path_factory):
    directory = tmp_path_factory.mktemp("out")
    write_analysis(analysis, directory)
    return directory


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light"), (400, "dark")])
def test_the_page_in_a_browser(browser, output, width, scheme):
    with open_page(browser, output / "report.html", width=width, color_scheme=scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.scrollingElement.scrollWidth - window.innerWidth") <= 0
        wide = [text for text in overflow(page) if not text.startswith(("TD", "TH"))]  # tables scroll in their boxes
        assert wide == []
        images = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)")
        assert len(images) == 8 and all(images)
        assert page.evaluate(CONTRASTS) == []
        assert page.locator(".claim").count() == 5
        assert page.locator("h1").evaluate("e => getComputedStyle(e).color") == (
            "rgb(230, 233, 236)" if scheme == "dark" else "rgb(29, 35, 41)"
        )


def test_figures_of_a_measured_sweep(output):
    names = {path.stem for path in (output / "figures").iterdir()}
    usual = {"trajectories", "relations", "fields", "fields_over_steps", "complexity"}
    assert names == usual | {"heads", "lambda", "stage_length"}


def test_claims_are_written_with_their_rules(analysis, output):
    claims = json.loads((output / "claims.json").read_text())
    assert [claim["claim"] for claim in claims] == [1, 2, 3, 4, 5]
    assert [claim["verdict"] for claim in claims] == [claim.verdict for claim in analysis.claims]
    assert all(part["rule"] and part["verdict"] for claim in claims for part in claim["parts"])
    page = (output / "report.html").read_text()
    assert all(f"{c.number}. " in page and c.verdict in page for c in analysis.claims)
    onsets = json.loads((output / "onsets.json").read_text())
    assert onsets["replicates"] == 50
    base = onsets["runs"][0]
    assert base["uas"]["bootstrap_over_items"]["low"] <= base["uas"]["break"]["step"]
    order = onsets["structure_before_capabilities"]["base"]
    assert order["runs"] == 2 and len(order["share_of_replicates_structure_first"]) == order["runs_with_both"]


def test_heads_that_end_best_are_followed_back(analysis):
    axis = draw_heads(analysis.runs).axes[0]
    run = analysis.runs[0]
    (mesh,) = [c for c in axis.collections if hasattr(c, "get_coordinates")]
    values = np.asarray(mesh.get_array()).reshape(5, -1)
    order = np.argsort(-run.measured.edge_counts, kind="stable")
    final = run.measured.head_counts[900].reshape(5, -1).max(axis=1) / run.measured.edge_counts
    np.testing.assert_allclose(values[:, -1], final[order])
    labels = [text.get_text() for text in axis.get_yticklabels()]
    assert [label.split()[0] for label in labels] == [run.measured.relations[i] for i in order]
    # The head of relation r is number 3r + 1 of 2 × 2 × 4.
    names = ["dep→head", "head→dep"]
    for label, r in zip(labels, order, strict=True):
        direction, layer, head = np.unravel_index(3 * r + 1, (2, 2, 4))
        assert label.endswith(f"L{layer} H{head} {names[direction]}")


def test_mean_curves_where_steps_differ():
    a = Curve(np.array([0.0, 10, 20]), np.array([0.0, 1, 2]))
    b = Curve(np.array([0.0, 5, 20, 30]), np.array([0.0, 1, 4, 9]))
    mean = mean_curve([a, b])
    assert mean.steps.tolist() == [0, 5, 10, 20] and mean.values == pytest.approx([0, 0.75, 1.5, 3])
    assert half_way(b) == 30 and half_way(Curve(a.steps, a.values[::-1])) is None


# Contrast (WCAG) of texts with the background they stand on, below 4.5 (large text: 3).
CONTRASTS = """() => {
  const parse = c => c.match(/[0-9.]+/g).map(Number);
  const lum = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
    return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126*r + 0.7152*g + 0.0722*b; };
  const found = new Set();
  for (const e of document.querySelectorAll("h1,h2,h3,p,li,td,th,span,small,summary,footer,pre,a,b")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
    let back = e, colour;
    while (back) { colour = parse(getComputedStyle(back).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) break; back = back.parentElement; }
    const style = getComputedStyle(e), a = lum(parse(style.color)), b = lum(back ? colour : [255, 255, 255]);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) found.add(`${e.tagName} ${e.className} ${ratio}`);
  }
  return [...found];
}"""
