"""--help of every program explains itself without importing what takes seconds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sas.config import help_text
from megatron_sas.launch.arguments import FIELDS, parse_arguments

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = [ROOT / "pretrain_mlm.py", *sorted((ROOT / "tools").glob("[!_]*.py"))]
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "spacy", "stanza", "matplotlib", "scipy", "sklearn")
HEAVY += ("ruptures", "tensorboard")

ONE_AFTER_ANOTHER = """
import contextlib, io, json, runpy, sys

heavy, *programs = json.loads(sys.stdin.read())

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in heavy:
            raise ImportError(f"{name} is imported for --help")

sys.meta_path.insert(0, Refuse())
printed = {}
for program in programs:
    sys.argv, out = [program, "--help"], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except ImportError as error:
            code = str(error)
    printed[program] = [code, out.getvalue()]
print(json.dumps(printed))
"""


def test_help_imports_nothing_heavy():
    """In one process, in turns: `tools/` is first on its path, as it is when Python is given a tool."""
    request = json.dumps([HEAVY, *map(str, PROGRAMS)])
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv.pop(1))\n" + ONE_AFTER_ANOTHER]
    done = subprocess.run([*command, ROOT / "tools"], input=request, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert [code for code, _ in printed.values()] == [0] * len(PROGRAMS), printed
    for program, (_, text) in printed.items():
        assert text.startswith(f"usage: {Path(program).name}")
        assert "--help" in text


def test_help_of_fields_is_that_of_the_sections(capsys):
    """After a change of the sections: python -m megatron_sas.config > megatron_sas/config_help.txt"""
    assert FIELDS.read_text(encoding="utf-8") == help_text() + "\n", (
        "config_help.txt is old; this test says how to renew it"
    )
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    assert help_text() in capsys.readouterr().out


def test_a_tool_uses_the_package_next_to_it(tmp_path):
    """Of two checkouts that share an environment, whichever is installed in it."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "_checkout.py", tmp_path / "tools")
    (tmp_path / "tools" / "tool.py").write_text("import _checkout\nimport megatron_sas\nprint(megatron_sas.__file__)\n")
    (tmp_path / "megatron_sas").mkdir()
    (tmp_path / "megatron_sas" / "__init__.py").write_text("")
    command, environment = [sys.executable, "tools/tool.py"], {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert Path(printed.strip()) == tmp_path / "megatron_sas" / "__init__.py"
    for tool in PROGRAMS[1:]:
        assert "\nimport _checkout\n" in tool.read_text(encoding="utf-8")
