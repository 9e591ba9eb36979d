"""The configuration of a run: one YAML file and `--section.field value` overrides, typed and checked as a whole.

The YAML owns batch sizes, precision, clipping and the optimizer. A DeepSpeed JSON may tune DeepSpeed's own machinery
(see `train/deepspeed_config.py`), and nothing is said in two places.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import SerializeAsAny, ValidationError, ValidationInfo, create_model, field_validator
from pydantic.fields import FieldInfo

from megatron_sas.core.cli import InputError
from megatron_sas.core.settings import FAULT_SEPARATOR, PARTLY, Section
from megatron_sas.core.yaml_file import Dumper, Loader, read_yaml
from megatron_sas.data.mixture import DataSection
from megatron_sas.evaluation.live import EvaluationSection
from megatron_sas.evaluation.registry import EVALUATIONS
from megatron_sas.model.architectures import ARCHITECTURES, read_section
from megatron_sas.model.bert import BertSection
from megatron_sas.model.config import ModelConfig
from megatron_sas.model.section import ModelSection
from megatron_sas.objective.base import Term
from megatron_sas.objective.masking import MaskingSection
from megatron_sas.objective.terms import TERMS, is_in_run, make_terms
from megatron_sas.onsets.online import WatchSection
from megatron_sas.optim.optimizers import OPTIMIZERS
from megatron_sas.optim.schedules import SCHEDULES, Schedule, Stage
from megatron_sas.optim.section import TrainSection
from megatron_sas.run.directory import RunSection, Seeds, SeedSection
from megatron_sas.run.records import LoggingSection
from megatron_sas.run.saver import CheckpointSection, SnapshotSection

NULL = ("", "~", "null")
NEWER = (("train", "schedule"), ("train", "optimizer"), ("model", "architecture"))
"""Sections and fields that came later than the format of checkpoints."""
NEWER_SECTIONS = ("seed", "masking")
SCHEDULED = ("schedule", "rate")
"""Names of fields that hold schedules."""


class Retired(NamedTuple):
    """A field of earlier versions: why it is left out, and the one value that it may have; others are refused."""

    reason: str
    value: Any = None  # None: any


RETIRED = {
    ("evaluation", "max_time_share"): Retired(
        "every evaluation that the configuration names is made, however long it takes"
    ),
    ("model", "norm_placement"): Retired(
        "LayerNorm comes after each block; a pre-LN BERT has no Hugging Face form, so no export, snapshots or GLUE",
        "post",
    ),
}


class _BeforeTerms(Section):
    run: RunSection
    seed: SeedSection = SeedSection()
    model: SerializeAsAny[ModelSection] = BertSection()
    data: DataSection
    masking: MaskingSection = MaskingSection()

    @field_validator("model", mode="before")
    @classmethod
    def _read_model(cls, values: Any, info: ValidationInfo) -> Any:
        """As the section of the architecture that it names."""
        return read_section(values, info.context)


_owned = {name: term.section_class for name, term in TERMS.items()}
_owned |= {name: optimizer.OPTIONS for name, optimizer in OPTIMIZERS.items() if optimizer.OPTIONS is not None}
_fields = {name: (section, section()) for name, section in _owned.items()}


class Config(create_model("_WithTerms", __base__=_BeforeTerms, **_fields)):
    """Everything that defines a run. A term of the objective, and an optimizer with options, have sections of their
    names."""

    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    snapshots: SnapshotSection = SnapshotSection()
    watch: WatchSection = WatchSection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()

    def faults(self) -> list[str]:
        """What is measured needs its data."""
        faults, evaluation, watch = [], self.evaluation, self.watch
        often = evaluation.every is not None and evaluation.every <= (watch.delta or evaluation.every)
        for owner in EVALUATIONS.values():
            for key in (metric.key for metric in owner.metrics if metric.key in watch.metrics):
                if not owner.wanted(evaluation) or not often:
                    needs = f"evaluation.{owner.input}, and evaluation.every of at most watch.delta"
                    faults.append(f"watch.metrics: {key} needs {needs}")
        for owner in EVALUATIONS.values():
            faults += [f"evaluation.{fault}" for fault in owner.faults(evaluation, self.data.validation is not None)]
        if shortage := self.masking.shortage(self.train.steps):
            faults.append(f"masking.{shortage}")
        return faults

    def seeds(self) -> Seeds:
        """The seeds of initial weights, data and dropout."""
        return self.seed.seeds(self.run.seed)

    def masking_rate(self) -> Schedule:
        """The probability with which training masks a token, by completed updates."""
        return self.masking.schedule(self.data.mask_prob)

    def shape(self, vocab_size: int, pad_token_id: int) -> ModelConfig:
        """The model's configuration, for a vocabulary."""
        return self.model.shape(vocab_size, pad_token_id)

    def terms(self, special_ids: Sequence[int] = ()) -> dict[str, Term]:
        """The terms of the run by name; `special_ids` are the tokenizer's."""
        return make_terms({name: getattr(self, name) for name in TERMS}, special_ids)

    def optimizer_options(self) -> Section | None:
        """The section of the optimizer, if it has one."""
        return getattr(self, self.train.optimizer, None)

    def used(self) -> dict[str, dict[str, Any]]:
        """The sections that this run reads, as YAML has them: none of terms and optimizers that it does not have."""
        unused = {name for name in TERMS if not is_in_run(name, getattr(self, name))}
        unused |= set(OPTIMIZERS) - {self.train.optimizer}
        return {name: values for name, values in self.model_dump(mode="json").items() if name not in unused}

    def differences(self, other: Config) -> dict[str, list[Any]]:
        """`section.field` to both values, of what is used and differs; None for the one that lacks the section."""
        before, after = self.used(), other.used()
        both = {
            f"{section}.{field}": [before.get(section, {}).get(field), after.get(section, {}).get(field)]
            for section in Config.model_fields
            for field in before.get(section) or after.get(section) or {}
        }
        return {name: values for name, values in both.items() if values[0] != values[1]}

    def to_yaml(self) -> str:
        """YAML that `load_config` reads back to an equal configuration.

        Newer fields and sections are left out at their defaults, so that versions without them can read it.
        """
        values = self.used()
        for section, field in NEWER:
            if values[section][field] == Config.model_fields[section].annotation.model_fields[field].default:
                del values[section][field]
        for section in NEWER_SECTIONS:
            if getattr(self, section) == type(getattr(self, section))():
                del values[section]
        return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), log: Callable[[str], None] = lambda line: None
) -> Config:
    """Read a YAML file, apply overrides (`--section.field value` or `--section.field=value`), and check everything.

    `log` gets a line for every field of an earlier version that is left out.

    Raises:
        InputError: with every fault found, one per line.
    """
    config, faults, _ = read_config(path, overrides, log)
    if faults:
        raise InputError(_message(path, faults))
    return config


def read_config(
    path: str | Path, overrides: Sequence[str] = (), log: Callable[[str], None] = lambda line: None
) -> tuple[Config | None, list[str], set[str]]:
    """As `load_config`, but whatever is wrong: the configuration, its faults, and the fields that they are in.

    Such a field (`section.field`) has its default in the configuration, which is None if a field is missing that has
    none. So the dry run can look at the rest.

    Raises:
        InputError: the file is not YAML.
    """
    values = {name: {} if section is None else section for name, section in read_yaml(path).items()}
    faults = _apply_overrides(values, overrides)
    for (section, field), retired in RETIRED.items():
        value = values[section].pop(field, None) if isinstance(values.get(section), dict) else None
        if value is not None and retired.value not in (None, value):
            faults.append(f"{section}.{field}: {value!r} is no longer possible: {retired.reason}")
        elif value is not None:
            log(f"{path}: {section}.{field} is ignored: {retired.reason}")
    try:
        return Config.model_validate(values), faults, set()
    except ValidationError as error:
        details = error.errors()
    described = [fault for detail in details for fault in _describe(detail)]
    for detail in details:
        _leave_out(values, detail)
    try:
        config = Config.model_validate(values, context=PARTLY)
    except ValidationError:
        config = None
    return config, faults + described, {fault.partition(":")[0] for fault in described}


def _leave_out(values: dict[str, Any], detail: dict[str, Any]) -> None:
    """Give the field in which a fault of validation is its default, or some value if it has none."""
    section, *rest = detail["loc"] or (None,)
    if section not in Config.model_fields:
        values.pop(section, None)
        return
    if not isinstance(values.get(section), dict) or (section, *rest) == ("model", "architecture"):
        values[section] = {}
    fields = _fields_of(section)
    for name in rest[:1]:
        values[section].pop(name, None)
    for name, field in fields.items():
        if field.is_required() and name not in values[section]:
            values[section][name] = 1 if field.annotation is int else "?"


def help_text() -> str:
    """Every field with its type, default and meaning: what `config_help.txt` holds, which `--help` prints.

    Written by `python -m megatron_sas.config > megatron_sas/config_help.txt` when a section has changed.
    """
    lines = ["Fields (in the YAML file, or as --section.field value):"]
    for section, info in Config.model_fields.items():
        lines.append(f"\n{section}: {(info.annotation.__doc__ or '').strip().splitlines()[0]}")
        for name, field in _fields_of(section).items():
            kind, default = _type_name(field.annotation), _show(field.default)
            default, only = "required" if field.is_required() else f"default {default}", ""
            if section == "model":
                kind = "|".join(ARCHITECTURES) if name == "architecture" else kind
                default, only = _by_architecture(name, default)
            lines.append(f"  {section}.{name} ({kind}; {default})\n      {field.description}{only}")
    return "\n".join(lines)


def _by_architecture(name: str, default: str) -> tuple[str, str]:
    """The default of a field of `model` where architectures differ, and which have it if not all do."""
    having = _having(name)
    others = {key: f"default {_show(field.default)}" for key, field in having.items()} if name != "architecture" else {}
    default += "".join(f"; {key} {text}" for key, text in others.items() if text != default)
    return default, "" if len(having) == len(ARCHITECTURES) else f" ({', '.join(having)} only)"


def _having(name: str) -> dict[str, FieldInfo]:
    """A field of `model` in the sections of the architectures that have it."""
    sections = {key: module.SECTION.model_fields for key, module in ARCHITECTURES.items()}
    return {key: fields[name] for key, fields in sections.items() if name in fields}


def _fields_of(section: str) -> dict[str, FieldInfo]:
    """The fields of a section by name: of `model` those of all architectures."""
    if section != "model":
        return Config.model_fields[section].annotation.model_fields
    found: dict[str, FieldInfo] = {}
    for module in ARCHITECTURES.values():
        found |= {name: field for name, field in module.SECTION.model_fields.items() if name not in found}
    return found


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Write the overrides into `values`; returns what is wrong with them."""
    faults, rest = [], list(overrides)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.partition("=")
        if not name.startswith("--") or name.count(".") != 1:
            faults.append(f"{argument}: not an override; write --section.field value")
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                faults.append(f"{name}: has no value")
                continue
            text = rest.pop(0)
        section, field = name[2:].replace("-", "_").split(".")
        literal = _is_text(section, field) and text not in NULL
        try:
            value = yaml.load(text, Loader=Loader)
        except yaml.YAMLError:
            if not literal:
                faults.append(f"{name}: {text!r} is not a YAML value")
                continue
            value = text
        if literal and not isinstance(value, str) and not (isinstance(value, list) and _may_be_list(section, field)):
            value = text
        target = values.setdefault(section, {})
        if isinstance(target, dict):
            target[field] = value
    return faults


def _is_text(section: str, field: str) -> bool:
    """Whether a field holds text, which on the command line needs no quotes (a path may look like a number)."""
    info = _fields_of(section).get(field) if section in Config.model_fields else None
    return info is not None and str in (info.annotation, *typing.get_args(info.annotation))


def _may_be_list(section: str, field: str) -> bool:
    """Whether a field that holds text may hold a list instead."""
    annotation = _fields_of(section)[field].annotation
    return any(typing.get_origin(part) is tuple for part in typing.get_args(annotation))


def _describe(detail: dict[str, Any]) -> list[str]:
    """One pydantic fault as phrases: where, what, and for typos what was probably meant."""
    location = [str(part) for part in detail["loc"]]
    kind = next((location.pop(i + 1) for i, name in enumerate(location[:-1]) if name in SCHEDULED), None)
    where = ".".join(location)
    if detail["type"] == "value_error":  # from `Section.faults`
        return [".".join([*location, fault]) for fault in str(detail["ctx"]["error"]).split(FAULT_SEPARATOR)]
    if detail["type"] == "missing":
        return [f"{where}: is required"]
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = list(Config.model_fields)
        if detail["type"] == "unexpected_keyword_argument":
            known = [field.name for field in fields(Stage if kind == "stages" else SCHEDULES[kind])]
        elif len(location) > 1:
            known = list(_fields_of(location[0]))
            if location[-1] in known:
                return [f"{where}: only {' and '.join(_having(location[-1]))} has this field; remove it"]
        close = difflib.get_close_matches(location[-1], known, n=1)
        return [f"{where}: unknown field; " + (f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}")]
    message = {"tuple_type": "should be a list", "model_type": "should be a mapping of fields"}.get(
        detail["type"], detail["msg"][0].lower() + detail["msg"][1:]
    )
    return [f"{where}: {message}, not {detail['input']!r}"]


def _message(path: str | Path, faults: list[str]) -> str:
    if len(faults) == 1:
        return f"{path}: {faults[0]}"
    return f"{path}: {len(faults)} faults:\n" + "\n".join(f"  {fault}" for fault in faults)


def _show(value: Any) -> str:
    return "none" if value is None or value == () else str(value)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "|".join(str(value) for value in typing.get_args(annotation))
    if annotation in (str, int, float, bool):
        return annotation.__name__
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(annotation) if part is not type(None))
    return "list"


if __name__ == "__main__":
    print(help_text())
