"""The README.md of an exported model: how it was trained, from what the checkpoint and its run tell."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megatron_sas import __version__
from megatron_sas.data.masking import BERT_SPLIT
from megatron_sas.evaluation.blimp_labels import renew_record
from megatron_sas.evaluation.registry import live_metrics
from megatron_sas.evaluation.uas import UAS
from megatron_sas.model.architectures import architecture_of
from megatron_sas.model.config import ModelConfig
from megatron_sas.objective.masking import MaskingSection
from megatron_sas.objective.terms import TERMS
from megatron_sas.optim.optimizers import OPTIMIZERS
from megatron_sas.optim.section import TrainSection
from megatron_sas.run.directory import CONFIG, STATE, describe_seeds, run_of

USE = """\
```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

For attention maps add `attn_implementation="eager"`; the default implementation returns none."""


def model_card(checkpoint: Path, config: ModelConfig, dtype: str) -> str:
    """Markdown with the model's shape, its training and, if the run's records are at hand, its evaluation.

    Args:
        checkpoint: a verified training checkpoint.
        config: its architecture.
        dtype: how the exported weights are stored, "fp32" or "bf16".
    """
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    path = checkpoint / CONFIG
    run = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    name = Path(run["run"]["output_dir"]).name if run else checkpoint.name
    parts = [
        *("---", "library_name: transformers", "pipeline_tag: fill-mask", "tags:"),
        *(f"- {config.architecture}", "- megatron_sas", "---"),
        "",
        f"# {name}, step {state['step']:,}",
        "",
        f"A {architecture_of(config).TITLE} masked language model: {config.num_layers} layers of width "
        f"{config.hidden_size}, {config.num_heads} attention heads, feed-forward width {config.intermediate_size}, "
        f"{config.vocab_size:,} vocabulary entries, at most {config.max_position_embeddings} tokens{_windows(config)}, "
        f"stored in {dtype}.",
        "",
        USE,
        "",
        "## Training",
        "",
        *_table(_training(state, run, config)),
    ]
    if run is not None:
        parts += ["", *_data(state, run), *_evaluation(checkpoint, state["step"])]
        parts += ["", "## Complete configuration", "", "```yaml", yaml.safe_dump(run, sort_keys=False).rstrip(), "```"]
    return "\n".join(parts) + "\n"


def _table(rows: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]


def _training(state: dict[str, Any], run: dict[str, Any] | None, config: ModelConfig) -> dict[str, Any]:
    rows: dict[str, Any] = {"updates": f"{state['step']:,}", "tokens": f"{state['tokens']:,}"}
    if state.get("lineage"):
        rows["branched from"] = "; then ".join(_describe_link(link) for link in state["lineage"])
    if "converted_from" in state:
        rows["initial weights"] = f"converted from {state['converted_from']}"
    if run is not None:
        train = run["train"]
        if run["model"].get("init_from"):
            rows["initial weights"] = run["model"]["init_from"]
        optimizer = OPTIMIZERS[train.get("optimizer", "adamw")].TITLE
        clipping = f"clipped at {train['grad_clip']:g}" if train["grad_clip"] else "not clipped"
        rows |= {
            "objective": f"masked LM ({_masking(run)}) + λ · R",
            **_terms(run),
            "batch": f"{train['global_batch_size']} sequences, micro-batch {train['micro_batch_size']}",
            "optimizer": f"{optimizer}, peak learning rate {train['learning_rate']:g}, "
            f"betas {tuple(train['adam_betas'])}, eps {train['adam_eps']:g}, weight decay {train['weight_decay']:g}, "
            f"gradient {clipping}",
            "learning rate": TrainSection(**train).schedule.course(),
            "dropout": _dropout(config),
            "precision": f"{train['precision']}, ZeRO stage {train['zero_stage']}",
            "seed": describe_seeds(run),
        }
    if "versions" in state:
        rows["trained with"] = ", ".join(f"{name} {version}" for name, version in state["versions"].items())
    rows["exported with"] = f"megatron_sas {__version__}"
    return rows


def _masking(run: dict[str, Any]) -> str:
    """How tokens were masked; the split is told where it is not BERT's."""
    section = MaskingSection(**run.get("masking", {}))
    text = f"each token masked with probability {section.schedule(run['data']['mask_prob']).describe()}"
    if section.split != BERT_SPLIT:
        text += "; of these {:.0%} to [MASK], {:.0%} to a random token".format(*section.split)
    return text


def _windows(config: ModelConfig) -> str:
    """How far local attention sees and in how many layers, or nothing."""
    local = [window for window in config.windows if window is not None]
    return f", local attention (± {local[0][0]} tokens) in {len(local)} layers" if local else ""


def _dropout(config: ModelConfig) -> str:
    fields = {name.removesuffix("_dropout"): p for name, p in asdict(config).items() if name.endswith("_dropout")}
    return ", ".join(f"{name} {p:g}" for name, p in fields.items())


def _terms(run: dict[str, Any]) -> dict[str, str]:
    """λ and R of the run's terms, which are named where there are several."""
    sections = {name: TERMS[name].section_class(**run[name]) for name in TERMS if name in run}
    rows = {}
    for name, section in sections.items():
        which = f" of {name}" if len(sections) > 1 else ""
        rows |= {f"λ{which}": section.schedule.describe(), f"R{which}": TERMS[name](section).describe()}
    return rows


def _describe_link(link: dict[str, Any]) -> str:
    changed = ", ".join(link["changed"]) or "nothing"
    return f"`{link['parent_run']}` at update {link['step']:,}, where {changed} changed"


def _data(state: dict[str, Any], run: dict[str, Any]) -> list[str]:
    facts = state.get("data")
    lines = ["## Data", ""]
    if facts is None:
        return [*lines, f"`{run['data']['train']}`"]
    rows = {
        "packed data": f"`{facts['prefix']}`",
        "sequences": f"{facts['num_sequences']:,} of {facts['seq_length']} tokens",
        "SHA-256 of the tokens": f"`{facts['fingerprint']}`",
        "inputs": ", ".join(f"`{name}`" for name in facts.get("inputs") or []),
        "parser": _inline(facts.get("parser")),
        "heads": facts.get("heads") or "the parser's",
        "counts": _inline(facts.get("counts")),
    }
    return [*lines, *_table({name: value for name, value in rows.items() if value})]


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_inline(item)}" for name, item in value.items())
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _evaluation(checkpoint: Path, step: int) -> list[str]:
    """The run's evaluation at `step`, if the checkpoint still lies in its run and the run evaluated then."""
    run, record = run_of(checkpoint), None
    if checkpoint.resolve().parent != run.checkpoints or not run.records.is_file():
        return []
    for line in run.records.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # a line that a killed run left unfinished
            values = json.loads(line)
            if (values.get("kind"), values.get("step")) == ("evaluation", step):
                record = renew_record(values)
    if record is None:
        return []
    metrics = [metric for metric in live_metrics() if metric.label]
    rows = {m.label: f"{record[m.key]:{m.format}}" for m in metrics if isinstance(record.get(m.key), float)}
    for metric in (metric for metric in metrics if metric.each):
        table = record.get(metric.key) or {}
        rows |= {metric.label.format(row): f"{value:{metric.format}}" for row, value in table.items()}
    note = "The heads behind UAS are the best ones on the treebank itself: compare with the same run's step 0."
    return ["", "## Evaluation at this step", "", *_table(rows), *(["", note] if UAS.key in record else [])]
