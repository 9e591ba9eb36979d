"""A tool called in this process: starting another one, and importing torch again, takes seconds."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def call_tool(name: str, *arguments: object, **options: object) -> None:
    """`main` of a tool, which takes the options; what it raises comes through."""
    with mock.patch.object(sys, "argv", [f"{name}.py", *map(str, arguments)]):
        runpy.run_path(str(TOOLS / f"{name}.py"))["main"](**options)


def exit_code(name: str, *arguments: object) -> int:
    """The code with which the command ends."""
    with mock.patch.object(sys, "argv", [f"{name}.py", *map(str, arguments)]):
        try:
            runpy.run_path(str(TOOLS / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            return end.code
    raise AssertionError("run_main ends by SystemExit")


def main() -> int:
    """A tool in a process of its own, for the fork server; the first argument is its name."""
    sys.path.insert(0, str(TOOLS))  # as when Python is given the tool
    return exit_code(*sys.argv[1:])


def run_tool(capsys, name: str, *arguments: object) -> subprocess.CompletedProcess:
    """The code and what the command prints; the environment that it sets for its workers is taken back."""
    capsys.readouterr()
    with mock.patch.dict(os.environ):
        code = exit_code(name, *arguments)
    return subprocess.CompletedProcess([name, *arguments], code, *capsys.readouterr())
