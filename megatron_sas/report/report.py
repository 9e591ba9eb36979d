"""All files of an analysis: figures, tables, JSON, and the self-contained HTML page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from megatron_sas import __version__
from megatron_sas.core.cli import progress
from megatron_sas.core.files import write_json_atomic, write_text_atomic
from megatron_sas.evaluation.minimal_pairs import FIELDS, SETS
from megatron_sas.report.analyse import Analysis
from megatron_sas.report.claims import NOT_TESTABLE, OPPOSITE, SHOWN
from megatron_sas.report.claims_effects import show_p
from megatron_sas.report.figures.complexity import draw_complexity
from megatron_sas.report.figures.fields import draw_fields_over_steps, draw_final_fields
from megatron_sas.report.figures.heads import draw_heads, draw_relations
from megatron_sas.report.figures.responses import draw_stage_response, draw_weight_response
from megatron_sas.report.figures.style import label_styles, save
from megatron_sas.report.figures.trajectories import draw
from megatron_sas.report.tables import (
    NOT_MEASURED,
    breakdown_rows,
    claims_json,
    differences_csv,
    mean,
    onset_rows,
    onsets_json,
    order_rows,
    relation_rows,
    run_rows,
    show,
    table_csv,
    table_markdown,
)
from megatron_sas.report.trajectories import METRICS, TABLE_METRICS

FULL_WIDTH = 9.5  # inches, of a figure that fills the page
PAGE_WIDTH = 1000  # CSS pixels


@dataclass(frozen=True)
class Picture:
    """A figure of the report: its file's name, what it shows in words, the SVG in base64, and its width on the page."""

    name: str
    text: str
    svg: str
    width: int  # CSS pixels at most


def write_analysis(analysis: Analysis, directory: Path, x_scale: str = "linear") -> list[str]:
    """Write figures/*.png and .svg, the tables, the JSON files and report.html into `directory`.

    Returns the sentences of the report, for the terminal.
    """
    pictures = write_figures(analysis, directory / "figures", x_scale)
    write_json_atomic(directory / "onsets.json", onsets_json(analysis))
    write_json_atomic(directory / "claims.json", claims_json(analysis))
    write_text_atomic(directory / "table.csv", table_csv(analysis.conditions))
    write_text_atomic(directory / "table.md", table_markdown(analysis.conditions))
    write_text_atomic(directory / "differences.csv", differences_csv(analysis))
    write_text_atomic(directory / "report.html", report_html(analysis, pictures))
    answers = [f"Claim {c.number}: {c.verdict}. {c.statement}" for c in analysis.claims]
    return [finding.text for finding in analysis.findings] + answers + analysis.notes


def write_figures(analysis: Analysis, directory: Path, x_scale: str) -> dict[str, Picture]:
    """Draw what the runs have data for, save each as PNG and SVG, and return the pictures by name."""
    directory.mkdir(parents=True)
    pictures = {}
    for name, (figure, text) in progress(draw_all(analysis, x_scale).items(), desc="figures"):
        for suffix in (".png", ".svg"):
            save(figure, directory / f"{name}{suffix}")
        encoded = base64.b64encode((directory / f"{name}.svg").read_bytes()).decode("ascii")
        pictures[name] = Picture(name, text, encoded, round(figure.get_figwidth() / FULL_WIDTH * PAGE_WIDTH))
    return pictures


def draw_all(analysis: Analysis, x_scale: str) -> dict[str, tuple[Figure, str]]:
    """Every figure that the runs have data for, with a description, by name."""
    conditions = analysis.conditions
    drawn = {
        "trajectories": (
            draw(analysis.runs, analysis.onsets, x_scale),
            "Masked-LM loss, UAS and BLiMP over training steps, one colour per condition, onsets marked",
        ),
        "relations": (
            draw_relations(conditions),
            "Accuracy of the best head of each relation over steps, by condition",
        ),
        "heads": (draw_heads(analysis.runs), "Accuracy over steps of the heads that end best"),
        "fields": (draw_final_fields(conditions), "Final BLiMP accuracy by field and condition, with standard errors"),
        "fields_over_steps": (
            draw_fields_over_steps(conditions, x_scale),
            "BLiMP accuracy by field over training steps",
        ),
        "lambda": (
            draw_weight_response(analysis.weights, analysis.control_weights),
            "Final loss, UAS and BLiMP over λ",
        ),
        "complexity": (
            draw_complexity(conditions, analysis.onsets, x_scale),
            "Intrinsic dimension, weight norm and attention entropy over training steps",
        ),
    }
    for response in analysis.stages:
        name = "stage_length" if len(analysis.stages) == 1 else f"stage_length_{response.weight:g}"
        text = f"Final loss, UAS and BLiMP over the step at which λ = {response.weight:g} is released"
        drawn[name] = (draw_stage_response(response), text)
    return {name: (figure, text) for name, (figure, text) in drawn.items() if figure is not None}


def report_html(analysis: Analysis, pictures: dict[str, Picture]) -> str:
    """The page: no scripts, nothing loaded from elsewhere."""
    runs, conditions = analysis.runs, analysis.conditions
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"show": show, "decimals": _decimals, "percent": _percent, "p": show_p}
    here = files("megatron_sas.report")
    template = (here / "report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
        version=__version__,
        analysis=analysis,
        conditions=conditions,
        metrics=METRICS,
        measured=[m for m in METRICS if any(m.name in condition.final for condition in conditions)],
        table_metrics=[m for m in TABLE_METRICS if any(m.name in condition.final for condition in conditions)],
        colours={label: colour for label, (colour, _) in label_styles(runs).items()},
        verdicts={SHOWN: "yes", OPPOSITE: "opposite", NOT_TESTABLE: "open"},
        last_step=max(run.final_step for run in runs),
        pictures=pictures,
        stage_pictures=[picture for name, picture in pictures.items() if name.startswith("stage_length")],
        onset_rows=onset_rows(runs, analysis.onsets),
        order_rows=order_rows(analysis),
        relation_rows=relation_rows(conditions),
        field_rows=breakdown_rows(conditions, FIELDS.key),
        set_rows=breakdown_rows(conditions, SETS.key),
        run_rows=run_rows(runs),
        uas_baseline=mean([run.uas_baseline for run in runs]),
        training_loss=any(run.training_loss for run in runs),
    )


def _decimals(value: float | None, digits: int = 2) -> str:
    return NOT_MEASURED if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    """Width of a bar in CSS."""
    return f"{100 * min(max(value or 0, 0), 1):.1f}%"
