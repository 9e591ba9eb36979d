"""All files of an analysis: figures, tables, JSON, and the self-contained HTML page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from megatron_sas import __version__
from megatron_sas.core.cli import progress
from megatron_sas.core.files import write_json_atomic, write_text_atomic
from megatron_sas.report import tables
from megatron_sas.report.analyse import Analysis
from megatron_sas.report.claims import NOT_TESTABLE, OPPOSITE, SHOWN
from megatron_sas.report.figures.finals import draw_final_fields, draw_stage_response, draw_weight_response
from megatron_sas.report.figures.heads import draw_heads, draw_relations
from megatron_sas.report.figures.style import save, styled
from megatron_sas.report.figures.trajectories import draw, draw_complexity, draw_fields_over_steps
from megatron_sas.report.statistics import NOT_MEASURED, show, show_interval, show_p
from megatron_sas.report.trajectories import METRICS, TABLE_METRICS

FULL_WIDTH = 9.5  # inches, of a figure that fills the page
PAGE_WIDTH = 1000  # CSS pixels


@dataclass(frozen=True)
class Picture:
    """A figure of the report: the SVG in base64, and its width on the page."""

    svg: str
    width: int  # CSS pixels at most


def write_analysis(analysis: Analysis, directory: Path, x_scale: str = "linear") -> list[str]:
    """Write figures/*.png and .svg, the tables, the JSON files and report.html into `directory`.

    Returns the sentences of the report, for the terminal.
    """
    pictures = write_figures(analysis, directory / "figures", x_scale)
    write_json_atomic(directory / "onsets.json", tables.onsets_json(analysis))
    write_json_atomic(directory / "claims.json", tables.claims_json(analysis))
    write_text_atomic(directory / "table.csv", tables.table_csv(analysis.conditions))
    write_text_atomic(directory / "table.md", tables.table_markdown(analysis.conditions))
    write_text_atomic(directory / "differences.csv", tables.differences_csv(analysis))
    write_text_atomic(directory / "report.html", report_html(analysis, pictures))
    answers = [f"Claim {c.number}: {c.verdict}. {c.statement}" for c in analysis.claims if c.verdict != NOT_TESTABLE]
    untested = [f"{c.number} ({c.name})" for c in analysis.claims if c.verdict == NOT_TESTABLE]
    answers += [f"Not testable with these runs: claims {', '.join(untested)}."] if untested else []
    return [finding.text for finding in analysis.findings] + answers + analysis.notes


def write_figures(analysis: Analysis, directory: Path, x_scale: str) -> dict[str, Picture]:
    """Draw what the runs have data for, save each figure as PNG and SVG, and return the pictures by name."""
    directory.mkdir(parents=True)
    conditions, onsets = analysis.conditions, analysis.onsets
    figures = {
        "trajectories": draw(conditions, onsets, x_scale),
        "relations": draw_relations(conditions),
        "heads": draw_heads(analysis.runs),
        "fields": draw_final_fields(conditions),
        "fields_over_steps": draw_fields_over_steps(conditions, x_scale),
        "lambda": draw_weight_response(analysis.weights, analysis.control_weights),
        "complexity": draw_complexity(conditions, onsets, x_scale),
        **{name: draw_stage_response(response) for name, response in analysis.stages.items()},
    }
    pictures = {}
    for name, figure in progress([drawn for drawn in figures.items() if drawn[1] is not None], desc="figures"):
        for suffix in (".png", ".svg"):
            save(figure, directory / f"{name}{suffix}")
        encoded = base64.b64encode((directory / f"{name}.svg").read_bytes()).decode("ascii")
        pictures[name] = Picture(encoded, round(figure.get_figwidth() / FULL_WIDTH * PAGE_WIDTH))
    return pictures


def report_html(analysis: Analysis, pictures: dict[str, Picture]) -> str:
    """The page: no scripts, nothing loaded from elsewhere."""
    runs, conditions = analysis.runs, analysis.conditions
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"show": show, "interval": show_interval, "decimals": _decimals, "percent": _percent}
    environment.filters["p"] = show_p
    here = files("megatron_sas.report")
    template = (here / "report.html.j2").read_text(encoding="utf-8")
    final = {name for condition in conditions for name in condition.final}
    return environment.from_string(template).render(
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
        version=__version__,
        analysis=analysis,
        conditions=conditions,
        measured=[metric for metric in METRICS if metric.name in final],
        table_metrics=[metric for metric in TABLE_METRICS if metric.name in final],
        colours={condition.label: colour for condition, colour, _ in styled(conditions)},
        untestable=NOT_TESTABLE,
        verdicts={SHOWN: "yes", OPPOSITE: "opposite", NOT_TESTABLE: "open"},
        last_step=max(run.final_step for run in runs),
        pictures=pictures,
        stages={name: response for name, response in analysis.stages.items() if name in pictures},
        tables=tables,
        uas_baseline=tables.mean([run.uas_baseline for run in runs]),
        training_loss=any(run.training_loss for run in runs),
    )


def _decimals(value: float | None, digits: int = 2) -> str:
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    """Width of a bar in CSS."""
    return f"{100 * min(max(value or 0, 0), 1):.1f}%"
