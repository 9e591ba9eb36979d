"""The files of an analysis: figure, tables, JSON, and a page that needs nothing but itself."""

import csv
import io
import json
import re
import warnings
from html.parser import HTMLParser

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D
from synthetic_runs import FIELDS, RELATIONS, write_run

from megatron_sas.report.analyse import Analysis
from megatron_sas.report.comparisons import summarize
from megatron_sas.report.figures.style import draw_legend, finish_grid, new_figure, styled
from megatron_sas.report.figures.trajectories import draw
from megatron_sas.report.load import load_runs
from megatron_sas.report.report import write_analysis
from megatron_sas.report.run_onsets import find_onsets
from megatron_sas.report.tables import breakdown_rows, relation_rows, show
from megatron_sas.report.trajectories import METRICS

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects text and addresses."""

    def __init__(self, html):
        super().__init__()
        self.open, self.addresses, self.text, self.tags = [], [], "", set()
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    paths = [write_run(root / f"base-{seed}", seed=seed) for seed in range(2)]
    paths.append(write_run(root / "minus", weight=0.015, uas_gain=0.0, seed=5))
    return load_runs(paths, ["base", "base", "SAS-"])


@pytest.fixture(scope="module")
def output(runs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("out")
    write_analysis(Analysis(runs, 90), directory)
    return directory


def test_files(output):
    names = {"claims.json", "differences.csv", "figures", "onsets.json", "report.html", "table.csv", "table.md"}
    assert {path.name for path in output.iterdir()} == names
    figures = {"trajectories", "relations", "fields", "fields_over_steps", "lambda", "complexity"}
    expected = {f"{name}.{suffix}" for name in figures for suffix in ("png", "svg")}
    assert {path.name for path in (output / "figures").iterdir()} == expected
    for name in figures:
        assert (output / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (output / "figures" / f"{name}.svg").read_bytes()


def test_onsets_json(runs, output):
    content = json.loads((output / "onsets.json").read_text())
    onsets = find_onsets(runs, 90)
    assert content["delta_steps"] == 90
    assert [entry["label"] for entry in content["runs"]] == ["base", "base", "SAS-"]
    for run, entry in zip(runs, content["runs"], strict=True):
        assert entry["lambda"] == run.describe_schedule()
        for metric in METRICS:
            onset = onsets[run.path][metric.name]
            assert entry[metric.name]["break"]["step"] == onset.strongest.step
            assert entry[metric.name]["change_point"]["low"] == onset.change.low


def test_tables(runs, output):
    base, minus = list(csv.DictReader(io.StringIO((output / "table.csv").read_text())))
    found = summarize(runs)
    assert (base["condition"], base["runs"], base["last_step"]) == ("base", "2", "900")
    assert float(base["uas"]) == found[0].final["uas"].mean
    assert float(base["uas_se"]) == found[0].final["uas"].error
    assert base["uas_difference"] == "" and minus["uas_se"] == ""
    assert float(minus["blimp_difference"]) == found[1].difference["blimp"].value.mean
    assert minus["role"] == "suppress" and minus["blimp_holm"] == ""  # one run has no spread to test with
    differences = list(csv.DictReader(io.StringIO((output / "differences.csv").read_text())))
    assert [row["metric"] for row in differences] == ["loss", "blimp", "uas"]
    assert {(row["condition"], row["compared_with"]) for row in differences} == {("SAS-", "base")}
    lines = (output / "table.md").read_text().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert show(found[0].final["uas"]) in lines[2] and "| 2 | 900 |" in lines[2]


def test_page_is_whole_and_self_contained(runs, output):
    html = (output / "report.html").read_text()
    page = Page(html)
    assert len(page.addresses) == 6
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe"}
    assert not re.search(r"url\(|@import|https?://", html)
    for expected in ("base", "SAS-", "minus", *RELATIONS, FIELDS[0], "untrained", "What happened"):
        assert expected in page.text
    assert "None" not in page.text and "nan" not in page.text


def test_names_cannot_break_the_page_or_the_figure(tmp_path, runs):
    labels = ["_hidden <b>$x^", "_hidden <b>$x^", "a|b & {{ 1 }}"]
    renamed = load_runs([run.path for run in runs], labels)
    write_analysis(Analysis(renamed, 90), tmp_path, "log")
    page = Page((tmp_path / "report.html").read_text())
    assert "_hidden <b>$x^" in page.text and "a|b & {{ 1 }}" in page.text
    assert "a\\|b" in (tmp_path / "table.md").read_text()


def test_same_runs_give_the_same_bytes(tmp_path, runs, output):
    write_analysis(Analysis(runs, 90), tmp_path)
    files = [path.relative_to(output) for path in output.rglob("*.*") if path.suffix not in (".svg", ".html")]
    assert len(files) == 11  # matplotlib's SVG, which the page contains, holds arbitrary names
    for path in files:
        assert (output / path).read_bytes() == (tmp_path / path).read_bytes(), path


@pytest.mark.parametrize("case", ["no blimp", "one evaluation", "step 0 only", "bare"])
def test_what_is_missing_is_left_out(tmp_path, case):
    steps = {"one evaluation": 10, "step 0 only": 0}.get(case, 300)
    run = write_run(tmp_path / "run", steps=steps, blimp=case != "no blimp")
    if case == "bare":
        lines = [json.dumps({"kind": "evaluation", "step": s, "uas": 0.1}) for s in (5, 10)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (run / "config.yaml").write_text("run: {}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_analysis(Analysis(load_runs([run]), 30), tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert ("Grammar by field" in page.text) == (case in ("one evaluation", "step 0 only"))
    assert ("Syntax by relation" in page.text) == (case != "bare")
    assert "None" not in page.text


def test_figure_panels_and_marks(runs):
    onsets = find_onsets(runs, 90)
    figure = draw(summarize(runs), onsets)
    weight, loss, uas, blimp = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["λ", "MLM loss", "UAS", "BLiMP"]
    base_steps = [onsets[run.path]["uas"].strongest.step for run in runs[:2]]
    dashed = [line for line in uas.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]]
    assert [line.get_xdata()[0] for line in dashed] == [sum(base_steps) / 2]  # the suppressed run has no clear break
    drawn = [list(line.get_xdata()) for line in uas.lines]
    for step in base_steps:
        assert [step] in drawn
    change = [list(onsets[run.path]["uas"].change.interval) for run in runs[:2]]
    assert not any(interval in drawn for interval in change)  # whiskers are the bend's, over items; here are none
    assert len(draw(summarize(runs[:1]), onsets).axes) == 3
    assert draw(summarize(runs), onsets, "log").axes[-1].get_xscale() == "symlog"
    assert loss.get_xlim() == weight.get_xlim() == blimp.get_xlim() == (0, 900)


def test_many_conditions_stay_distinct(runs):
    many = load_runs([runs[0].path])
    many = [type(many[0])(**{**vars(many[0]), "label": f"c{i}"}) for i in range(20)]
    assert len({(colour, dash) for _, colour, dash in styled(summarize(many))}) == 20


def test_relations_and_fields_are_means_over_runs(runs):
    found = summarize(runs)
    rows = {row["name"]: row for row in relation_rows(found)}
    assert list(rows) == sorted(RELATIONS, key=lambda name: -RELATIONS[name])
    expected = [run.evaluations[-1]["uas_relations"]["obj"]["accuracy"] for run in runs[:2]]
    assert rows["obj"]["cells"][0]["final"] == pytest.approx(sum(expected) / 2)
    assert rows["det"]["offset"] == "−1" and rows["nsubj"]["offset"] == "+1"
    fields = {row["name"]: row for row in breakdown_rows(found, "field")}
    expected = [run.evaluations[0]["blimp_fields"]["determiner_noun"] for run in runs[:2]]
    assert fields["determiner noun"]["cells"][0]["untrained"] == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize(("width", "columns"), [(9.5, 5), (6.0, 4), (4.5, 3), (1.0, 1)])
def test_legends_are_as_wide_as_their_figure_allows(width, columns):
    figure = new_figure(width, 3.0)
    handles = [Line2D([], [], label=f"condition-{i}") for i in range(11)]
    draw_legend(figure, handles)
    (legend,) = figure.legends
    assert legend._ncols == columns
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert columns == 1 or legend.get_window_extent(renderer).width <= figure.bbox.width
    assert [text.get_text() for text in legend.get_texts()] == [f"condition-{i}" for i in range(11)]


@pytest.mark.parametrize(("panels", "labelled"), [(2, [0, 1]), (3, [0, 1, 2]), (5, [2, 3, 4]), (6, [3, 4, 5])])
def test_grids_have_steps_below_every_column(panels, labelled):
    axes = new_figure(5, 3).subplots(-(-panels // 3), 3, sharex=True, squeeze=False)
    finish_grid(axes, panels)
    flat = list(axes.flat)
    assert [i for i, axis in enumerate(flat) if axis.get_xlabel()] == labelled
    assert all(flat[i].xaxis.get_tick_params()["labelbottom"] for i in labelled)
    assert [axis.axison for axis in flat] == [i < panels for i in range(len(flat))]
