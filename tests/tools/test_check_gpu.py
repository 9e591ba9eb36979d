"""The check of a GPU: the budget, what a call leaves to the next, and every stage's commands at tiny sizes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import check_gpu as tool
import psutil
import pytest
from check_gpu import Stage
from tool_calls import exit_code

from megatron_sas.kernels.backends import BACKENDS, PREFERENCE

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {"gpu": "none", "git": None}
WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"


def writes(name: str, value: str, seconds: float = 10.0) -> Stage:
    return Stage(name, seconds, (("-S", "-c", WRITE, "{out}/found.json", value),))


FAILS = Stage("fails", 1.0, (("-S", "-c", "print('why'); raise SystemExit(3)"), ("-S", "-c", "print('never')")))


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_results_are_written_one_by_one_and_the_rest_is_left_to_the_next_call(tmp_path, capsys):
    wanted = [writes("first", "1"), FAILS, writes("long", "2", seconds=1e4), writes("last", "3")]
    assert tool.check(tmp_path, wanted, 1.0, ABOUT, small=True) == ["long"]
    assert [(read(tmp_path, n)["status"], read(tmp_path, n)["result"]) for n in ("first", "fails", "last")] == [
        ("done", {"found": 1}), ("failed", {}), ("done", {"found": 3}),
    ]  # fmt: skip
    assert read(tmp_path, "fails")["error"] == "exit code 3" and read(tmp_path, "fails")["output"] == ["why"]
    assert read(tmp_path, "first")["gpu"] == "none"
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()] == ["first", "fails", "    why", "last"]
    before = (tmp_path / "first.json").stat().st_mtime_ns
    wanted[2] = writes("long", "2")
    wanted[3] = writes("last", "4")  # other commands: another result
    assert tool.check(tmp_path, wanted, 1.0, ABOUT, small=True) == []
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["long", "last", "fails", "    why"]
    assert (tmp_path / "first.json").stat().st_mtime_ns == before and read(tmp_path, "last")["result"] == {"found": 4}


def test_a_stage_that_hangs_ends_with_all_its_processes(tmp_path, monkeypatch):
    """By its own limit it failed; by the end of the budget it was cut off, and comes last in the next call."""
    child = "import subprocess, sys; subprocess.Popen(['sleep', '1234.5']); print('started', flush=True); import time; "
    hangs = Stage("hangs", 1.0, (("-S", "-c", child + "time.sleep(60)"),))
    tool.check(tmp_path, [hangs], 1.0, ABOUT, small=True)
    assert read(tmp_path, "hangs")["status"] == "failed" and "stopped after" in read(tmp_path, "hangs")["error"]
    assert read(tmp_path, "hangs")["output"] == ["started"]  # and so its child
    (tmp_path / "hangs.json").unlink()
    assert tool.check(tmp_path, [hangs], 2 / 60, ABOUT, small=True) == ["hangs"]
    assert read(tmp_path, "hangs")["status"] == "cut off" and read(tmp_path, "hangs")["output"] == ["started"]
    running = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert ["sleep", "1234.5"] not in running


def test_a_check_that_is_ended_leaves_whole_results(tmp_path):
    code = (
        "import sys, signal; sys.path[:0] = ['tools', '.']; import check_gpu as t; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"stages = [t.Stage('first', 1.0, (('-S', '-c', {WRITE!r}, '{{out}}/a.json', '1'),)),"
        " t.Stage('second', 9.0, (('-S', '-c', 'import time; time.sleep(60)'),))]\n"
        f"t.check(Path({str(tmp_path)!r}), stages, 1.0, {ABOUT!r}, True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("first: done")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert os.listdir(tmp_path) == ["first.json"] and read(tmp_path, "first")["result"] == {"a": 1}


def test_every_kind_of_stage_works_at_tiny_sizes(tmp_path, monkeypatch, capsys):
    """In this process, where importing takes no time."""
    pytest.importorskip("triton")
    records = {}
    names = ("gradients-triton", "gradients-fa4", "attention-0.1", "training-2", "evaluation", "speedup-packed")
    for stage in (stage for stage in tool.stages(small=True) if stage.name in names):
        out = tmp_path / stage.name
        out.mkdir()
        for command in stage.commands:
            name, *arguments = (argument.replace("{out}", str(out)) for argument in command)
            if name == "-c":
                monkeypatch.setattr(sys, "argv", arguments)
                exec(arguments[0], {})
            else:
                assert exit_code(Path(name).stem, *arguments) == 0, capsys.readouterr()
        result = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
        records[stage.name] = {"status": "done", "seconds": 1.0, "git": None, "result": result}
        assert tool.headline(stage.name, result)
    assert set(records) == set(names)
    rows = records["gradients-triton"]["result"]["attention"]["records"]
    assert {(r["gradient"], r["seq_length"]) for r in rows} == {(g, s) for g in ("alone", "uniform") for s in (1, 17)}
    assert set(records["training-2"]["result"]["training"]["variants"]) == {"ours_max", "ours_mlm", "paper", "hf_sdpa"}
    printed = tool.tables(tool.stages(small=True), records)
    assert "| tests-gpu | missing | 150? | | |" in printed and "| seconds of paper / ours_max |" in printed


def test_stages_stand_in_their_order():
    for small in (False, True):
        parts = list(dict.fromkeys(stage.name.split("-")[0] for stage in tool.stages(small)))
        assert parts == ["gradients", "attention", "training", "evaluation", "tests", "speedup"]
    assert [s.name for s in tool.stages(False)].index("training-128") == 10
    evaluation = tool.stages(False, model="M", blimp="B", treebank="T")[11]
    assert evaluation.commands[-1][-3:] == ("T", "--output", "{out}/uas.json")


def test_counts_of_tests_are_read():
    output = "....\nFAILED tests/a.py::b - AssertionError\n3 failed, 20 passed, 5 skipped, 1 error in 4.50s\n"
    found = tool.read_tests(output)
    assert found == {"failed": 3, "passed": 20, "skipped": 5, "error": 1, "failures": [output.splitlines()[1]]}
    assert tool.read_tests("") == {"failures": []}


def test_the_order_of_auto_is_that_of_the_measured_times(tmp_path):
    """Of backends whose gradients passed, with edges; FlexAttention and FlashAttention-4 do not take part."""
    times = {"triton": 2.0, "sdpa": 3.0, "cudnn": 1.0, "flex": 0.5, "fa4": 0.1}
    records = [
        {"backend": n, "gradient": gradient, "forward_seconds": 1.0, "backward_seconds": t * (gradient == "max")}
        for n, t in times.items() for gradient in ("none", "max")
    ]  # fmt: skip
    for stage in tool.stages(False):
        if stage.name.startswith(("gradients", "attention-0.1")):
            status = "failed" if stage.name == "gradients-sdpa" else "done"
            result = {"attention": {"device": {"architecture": "sm_90"}, "records": records}}
            head = {"commands": stage.commands, "status": status, "result": result}
            (tmp_path / f"{stage.name}.json").write_text(json.dumps(head))
    assert tool.preference([tmp_path]) == {"sm_90": {"dropout": ["cudnn", "triton", "chunked"]}}
    path = tmp_path / "gradients-triton.json"
    path.write_text(path.read_text().replace('"done"', '"cut off"'))  # nobody knows yet
    assert tool.preference([tmp_path]) == {}
    path.unlink()
    assert tool.preference([tmp_path]) == {}
    assert set(tool.AUTO) == set(PREFERENCE["cuda"])
    assert all(BACKENDS[name].output_and_lse for name in tool.AUTO)
