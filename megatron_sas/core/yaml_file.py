"""Reading YAML that people write: numbers as they write them, duplicates refused, faults named with their line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_sas.core.cli import InputError


class Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number (YAML 1.1 wants 1.0e-4) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a field name must be plain text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """SafeDumper that puts text in quotes where `Loader` would read a number."""


for _class in (Loader, Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times as fast as `Loader` where libyaml is, for files that this program wrote: it lacks what people need."""


def read_yaml(path: str | Path, loader: type = Loader) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; see examples/ for configurations to start from") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; give a YAML configuration") from None
    try:
        values = yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", error)).splitlines()[0]
        raise InputError(f"{path}{line}: is not valid YAML ({problem})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a mapping of sections (run, model, data, …)")
    return values
