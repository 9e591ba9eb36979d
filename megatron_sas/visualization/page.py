"""One self-contained HTML page from what `attention.py` computes: style, script and data inline, nothing loaded."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from megatron_sas.evaluation.treebank import Sentence
from megatron_sas.report.load import load_run
from megatron_sas.report.trajectories import METRICS, Curve, Run
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.records import read_records
from megatron_sas.visualization.attention import ModelView, Place, counted_relations, shown_relations, word_levels


def page_data(
    *,
    title: str,
    steps: Sequence[int],
    names: Sequence[str],
    views: Sequence[ModelView],
    heads: Sequence[Place],
    sentences: Sequence[Sentence],
    sources: dict[str, str],
    treebank: dict[str, Any],
    run: Run | None,
) -> dict[str, Any]:
    """The JSON that page.js draws.

    `steps`, `names` and `views` have one entry per model; `treebank` says what the best heads were chosen on: name,
    sentences, edges, and whether these are the shown sentences themselves (`own`); `sources` says in words where models
    and sentences come from; `run` adds the curves that were recorded while training.
    """
    shown = shown_relations(sentences)
    last = views[-1].relations
    relations = [name for name in last if name in shown]
    return {
        "title": title,
        "sources": sources,
        "treebank": treebank,
        "schedule": None if run is None else run.describe_schedule(),
        "steps": list(steps),
        "names": list(names),
        "uas": [round(view.uas, 4) for view in views],
        "uasBaseline": round(views[-1].uas_baseline, 4),
        "curves": recorded_curves(run),
        "sentences": [_sentence(sentence, relations) for sentence in sentences],
        "relations": [
            {
                "name": name,
                "edges": last[name]["count"],
                "baseline": round(last[name]["baseline"], 3),
                "offset": last[name]["baseline_offset"],
                "best": [
                    [row["layer"], row["head"], row["direction"], round(row["accuracy"], 3)]
                    for row in (view.relations[name] for view in views)
                ],
            }
            for name in relations
        ],
        "missing": sorted(shown.keys() - last.keys()),
        "heads": [list(place) for place in heads],
        "predictions": [view.predictions for view in views],
        "attention": [view.attention for view in views],
    }


def _sentence(sentence: Sentence, relations: Sequence[str]) -> dict[str, Any]:
    """`relation[i]`: the number of the relation that word i's best head is chosen for, -1 where there is none."""
    numbers = {name: number for number, name in enumerate(relations)}
    counted = counted_relations(sentence)
    return {
        "words": list(sentence.words),
        "heads": list(sentence.heads),
        "relns": list(sentence.deprels),
        "relation": [numbers.get(name, -1) for name in counted],
        "counts": [name is not None for name in counted],
        "level": word_levels(sentence.heads),
    }


def find_run(path: Path) -> Run | None:
    """The run that `path` is, if it has recorded evaluations."""
    records = RunDirectory(path).records
    if not records.is_file() or not any(record["kind"] == "evaluation" for record in read_records(records)):
        return None
    return load_run(path.resolve(), path.resolve().name)


def recorded_curves(run: Run | None) -> dict[str, list[list[float]]]:
    """Loss, UAS and BLiMP as lists of [step, value], empty where nothing was recorded."""
    curves = {metric.name: run.metric(metric) if run else Curve.of([]) for metric in METRICS}
    return {
        name: [[int(step), round(float(value), 5)] for step, value in zip(curve.steps, curve.values, strict=True)]
        for name, curve in curves.items()
    }


def render(data: dict[str, Any]) -> str:
    """The page. Texts of the data reach the document as text only: script and style come from files of this package."""
    package = files("megatron_sas.visualization")
    page, style, script = ((package / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    # "<" would end the script element early (</script>) or open a comment (<!--) in it; in JSON it may be escaped.
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(page)
    return template.render(title=html.escape(data["title"]), style=style, script=script, data=content)
