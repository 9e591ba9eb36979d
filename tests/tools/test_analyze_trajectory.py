"""tools/analyze_trajectory.py as a command."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "analyze_trajectory.py"

from synthetic_runs import write_run  # noqa: E402
from tool_calls import exit_code  # noqa: E402


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / "base"), write_run(root / "minus", weight=0.015, uas_gain=0.0)]


def test_two_runs(run_dirs, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [*run_dirs, "--output", output, "--labels", "base", "SAS-", "--delta", "75", "--x-scale", "log"]
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert (result.returncode, result.stderr) == (0, "")
    assert "In base, MLM loss breaks downward at step" in result.stdout
    assert "Compared with the base (λ = 0), SAS- ends with" in result.stdout
    assert "Δ =\n75 steps" in (output / "report.html").read_text()

    assert exit_code("analyze_trajectory", *run_dirs, "--output", output) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "--overwrite" in error
    (output / "stale").touch()
    short = write_run(tmp_path / "short", steps=10)
    assert exit_code("analyze_trajectory", short, "--output", output, "--overwrite") == 0
    assert not (output / "stale").exists() and "short" in (output / "report.html").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "short"}


def test_bad_input_is_one_line_and_leaves_nothing(run_dirs, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.yaml").write_text("run: {}\n")
    (broken / "metrics.jsonl").write_text('{"kind": "evaluation", "step": 1, "uas": 0.1}\nnot json\n{}\n')
    for arguments, expected in [
        ([tmp_path / "absent"], "not a directory"),
        ([broken], "metrics.jsonl, line 2"),
        ([*run_dirs, "--labels", "one"], "1 label(s) for 2 run(s)"),
        ([*run_dirs, "--labels", "one", "one"], "with and without a SAS term"),
        ([*run_dirs, "--delta", "-3"], "--delta"),
    ]:
        assert exit_code("analyze_trajectory", *arguments, "--output", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert expected in error and error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_help_explains(capsys):
    assert exit_code("analyze_trajectory", "--help") == 0
    text = capsys.readouterr().out
    assert "report.html" in text and "--labels" in text and "onsets.json" in text
