"""The worked examples of docs/extending.md: their files and edits, applied to a copy of the program."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_BLOCK = re.compile(r"^```(python|diff|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PATH = re.compile(r"`(megatron_sas/[\w/]+\.py)`:\s*\Z")  # the words before a block name its file


@dataclass
class Example:
    """One patch: whole new files and edits of existing ones by path, and what a configuration says to use it."""

    title: str
    new_files: dict[str, str] = field(default_factory=dict)
    edits: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> set[str]:
        """All files that it touches."""
        return {*self.new_files, *self.edits}

    def apply(self, root: Path) -> None:
        """Write the files under `root`; every edited passage must be there exactly once."""
        for path, text in self.new_files.items():
            assert not (root / path).exists(), f"{path} exists already"
            (root / path).write_text(text, encoding="utf-8")
        for path, passages in self.edits.items():
            text = (root / path).read_text(encoding="utf-8")
            for old, new in passages:
                assert text.count(old) == 1, f"{self.title}: in {path} {text.count(old)} times:\n{old}"
                text = text.replace(old, new)
            (root / path).write_text(text, encoding="utf-8")


def read_examples(page: str) -> list[Example]:
    """The examples of a page, one per section that holds code."""
    examples = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        example, end = Example(section.partition("\n")[0]), 0
        for block in _BLOCK.finditer(section):
            kind, code = block.groups()
            if kind == "yaml":
                example.settings |= yaml.safe_load(code)
            else:
                (path,) = _PATH.findall(section[end : block.start()])
                if kind == "python":
                    example.new_files[path] = code
                else:
                    example.edits[path] = [_passage(hunk) for hunk in re.split(r"^@@\n", code, flags=re.MULTILINE)]
            end = block.end()
        examples.append(example)
    return examples


def promised_files(page: str) -> dict[str, int]:
    """How many files each example may touch, by its title in lower case, from the table at the top of the page."""
    rows = re.findall(r"^\| \[(.+?)\]\(.*?\).*?\|.*?\| (\d+) \|", page, flags=re.MULTILINE)
    return {title: int(count) for title, count in rows}


def _passage(hunk: str) -> tuple[str, str]:
    """What stands before and what after; an empty line of a diff is context."""
    lines = [line if line else " " for line in hunk.splitlines()]
    old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
    return old, new
