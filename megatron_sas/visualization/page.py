"""One self-contained HTML page from what `attention.py` computes: style, script and data inline, nothing loaded."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from megatron_sas.evaluation.treebank import Sentence
from megatron_sas.report.load import load_run
from megatron_sas.report.trajectories import METRICS, Run
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.records import read_records
from megatron_sas.visualization.attention import ModelView, Place, base_relation, counts, shown_relations, word_levels


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
    relations = [name for name in views[-1].relations if name in shown]
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
                "edges": views[-1].relations[name]["count"],
                "baseline": round(views[-1].relations[name]["baseline"], 3),
                "offset": views[-1].relations[name]["baseline_offset"],
                "best": [
                    [row["layer"], row["head"], row["direction"], round(row["accuracy"], 3)]
                    for row in (view.relations[name] for view in views)
                ],
            }
            for name in relations
        ],
        "missing": sorted(name for name in shown if name not in views[-1].relations),
        "heads": [list(place) for place in heads],
        "predictions": [view.predictions for view in views],
        "attention": [view.attention for view in views],
    }


def _sentence(sentence: Sentence, relations: Sequence[str]) -> dict[str, Any]:
    """`relation[i]`: the number of the relation that word i's best head is chosen for, -1 where there is none."""
    numbers = {name: number for number, name in enumerate(relations)}
    return {
        "words": list(sentence.words),
        "heads": list(sentence.heads),
        "relns": list(sentence.deprels),
        "relation": [
            numbers.get(base_relation(relation), -1) if is_counted else -1
            for relation, is_counted in zip(sentence.deprels, counts(sentence), strict=True)
        ],
        "counts": counts(sentence),
        "level": word_levels(sentence.heads),
    }


def find_run(path: Path) -> Run | None:
    """The run that `path` is, if it has recorded evaluations."""
    records = RunDirectory(path).records
    if not records.is_file() or not any(record["kind"] == "evaluation" for record in read_records(records)):
        return None
    return load_run(path.resolve(), path.resolve().name)


def recorded_curves(run: Run | None) -> dict[str, Any]:
    """Loss, UAS and BLiMP as lists of [step, value], empty where nothing was recorded."""
    curves = {metric.name: [] for metric in METRICS}
    if run is not None:
        for metric in METRICS:
            curve = run.metric(metric)
            curves[metric.name] = [[int(s), round(float(v), 5)] for s, v in zip(curve.steps, curve.values, strict=True)]
    return curves


def render(data: dict[str, Any]) -> str:
    """The page. Texts of the data reach the document as text only: script and style come from files of this package."""
    package = files("megatron_sas.visualization")
    # "<" would end the script element early (</script>) or open a comment (<!--) in it; in JSON it may be escaped.
    content = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = (package / "page.html").read_text(encoding="utf-8")
    parts = {
        "title": html.escape(data["title"]),
        "style": (package / "page.css").read_text(encoding="utf-8"),
        "script": (package / "page.js").read_text(encoding="utf-8"),
        "data": content,
    }
    before, *rest = page.split("{{")
    return before + "".join(parts[name] + after for name, after in (part.split("}}", 1) for part in rest))
