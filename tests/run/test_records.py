"""Records: whole lines, valid JSON, exact cut on resume, TensorBoard points without overlap."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
import torch
from engine_runs import free_port
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sas.core.cli import InputError
from megatron_sas.run.records import Records, read_records


def write_steps(records, steps):
    for step in steps:
        records.write("train", step, {"loss": 1.0 / (step + 1)})


def test_lines_are_what_was_written(tmp_path):
    records = Records(tmp_path / "run", -1, tensorboard=False)
    before = time.time()
    records.write("event", 0, {"event": "start", "hosts": ["a", "b"]})
    records.write("train", 1, {"loss": torch.tensor(2.5), "lr": np.float32(0.5), "tokens": np.int64(7)})
    records.write("evaluation", 1, {"uas": 0.25, "uas_relations": {"nsubj": {"accuracy": 0.5, "count": 100}}})
    records.close()
    records.close()
    event, train, evaluation = read_records(tmp_path / "run" / "metrics.jsonl")
    assert event["event"] == "start" and event["hosts"] == ["a", "b"]
    assert before - 1 <= train.pop("time") <= time.time() + 1
    assert train == {"kind": "train", "step": 1, "loss": 2.5, "lr": 0.5, "tokens": 7}
    assert evaluation["uas_relations"] == {"nsubj": {"accuracy": 0.5, "count": 100}}


def test_numbers_that_json_lacks_become_null(tmp_path):
    records = Records(tmp_path, -1, tensorboard=True)
    bad = {
        "loss": math.nan,
        "nested": {"a": -math.inf},
        "array": np.array([1.0, math.nan]),
        "t": torch.tensor(math.inf),
    }
    records.write("train", 1, bad)
    records.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["loss"], line["nested"], line["array"], line["t"]) == (None, {"a": None}, [1.0, None], None)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["train", "evaluation", "event"]), st.integers(0, 20)), max_size=20),
    st.integers(-1, 21),
    st.integers(0, 60),
)
def test_resume_keeps_exactly_the_lines_up_to_its_step(tmp_path_factory, written, resume, torn):
    run = tmp_path_factory.mktemp("run")
    records = Records(run, -1, tensorboard=False)
    for kind, step in written:
        records.write(kind, step, {"loss": step / 2})
    records.close()
    path = run / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - torn)])
    whole = []
    position = 0
    for line in content.splitlines(keepends=True):
        position += len(line)
        if position - 1 <= len(content) - torn:  # a record whose newline alone is missing is whole
            whole.append(json.loads(line))
    resumed = Records(run, resume, tensorboard=False)
    resumed.write("event", resume, {"event": "resumed"})
    resumed.close()
    expected = [record for record in whole if record["step"] <= resume]
    *kept, last = read_records(path)
    assert kept == expected
    assert last["event"] == "resumed"
    assert all(resumed.has(r["kind"], r["step"]) for r in expected if r["kind"] != "train")
    assert not resumed.has("train", resume + 1)


def test_resume_drops_broken_lines_and_says_so(tmp_path, capsys):
    records = Records(tmp_path, -1, tensorboard=False)
    write_steps(records, [1])
    os.write(records._descriptor, b'{"kind": "train", "st\n[1]\n{"kind": "train"}\n\xff\n')
    write_steps(records, [2])
    records.close()
    Records(tmp_path, 5, tensorboard=False).close()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "dropped 4 unreadable line(s)" in capsys.readouterr().err


def test_resume_without_a_file_starts_one(tmp_path):
    records = Records(tmp_path, 3, tensorboard=False)
    write_steps(records, [4])
    records.close()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [4]


def test_wrong_use(tmp_path):
    records = Records(tmp_path, -1, tensorboard=False)
    with pytest.raises(ValueError, match="unknown kind"):
        records.write("test", 1, {})
    with pytest.raises(ValueError, match="reserved names"):
        records.write("train", 1, {"step": 2})
    records.close()
    with pytest.raises(OSError):
        records.write("train", 1, {"loss": 1.0})


def test_a_full_disk_leaves_no_partial_line(tmp_path, monkeypatch):
    records = Records(tmp_path, -1, tensorboard=False)
    write_steps(records, [1])
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:9]))
    with pytest.raises(OSError, match="No space left"):
        write_steps(records, [2])
    monkeypatch.undo()
    write_steps(records, [3])
    records.close()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 3]


def test_a_full_disk_under_tensorboard_is_named(tmp_path, monkeypatch):
    """Its thread's errors arrive at the next call, without a path."""

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    records = Records(tmp_path, -1, tensorboard=True)
    board = records._board
    for owner, method, action in (
        (board.file_writer, "add_summary", lambda: records.write("train", 1, {"loss": 1.0})),
        (board, "flush", records.flush),
        (board, "close", records.close),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, fail)
            with pytest.raises(OSError, match=f"{tmp_path}/tensorboard"):
                action()
    records.close()


def test_of_training_nothing_is_remembered(tmp_path):
    """A month of it would fill the host's memory."""
    records = Records(tmp_path, -1, tensorboard=False)
    for step in range(5):
        records.write("train", step, {"loss": 1.0})
    records.write("evaluation", 4, {"uas": 0.5})
    assert len(records._written) == 1 and records.has("evaluation", 4)
    records.close()
    again = Records(tmp_path, 4, tensorboard=False)
    assert again._written == records._written
    again.close()


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    program = """
        from megatron_sas.run.records import Records
        records = Records({path!r}, -1, tensorboard=False)
        step = 0
        while True:
            records.write("train", step, {{"loss": 1.5, "filler": "x" * 2000}})
            step += 1
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program).format(path=str(tmp_path))])
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 100_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [record["step"] for record in read_records(path)]
    assert len(steps) > 40
    assert steps == list(range(len(steps)))


def test_reading_tolerates_only_a_torn_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "train", "step": 1, "time": 0, "loss": 1.0}\n'
    path.write_bytes(good + b"\n" + good + good[:20])
    assert len(read_records(path)) == 2
    path.write_bytes(good + good[:-1])
    assert len(read_records(path)) == 2
    path.write_bytes(good + good[:20] + b"\n" + good)
    with pytest.raises(InputError, match=r"metrics.jsonl, line 2: not a metrics record"):
        read_records(path)
    path.write_bytes(good + b"[1, 2]\n")
    with pytest.raises(InputError, match="line 2"):
        read_records(path)
    with pytest.raises(InputError, match="no such file"):
        read_records(tmp_path / "absent.jsonl")


def scalars(run):
    """All points in the files, those included that readers may hide; files of one second are not in order."""
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    board.Reload()
    return {tag: sorted((point.step, point.value) for point in board.Scalars(tag)) for tag in board.Tags()["scalars"]}


def test_tensorboard_has_nested_tags_and_no_overlap_after_resume(tmp_path):
    first = Records(tmp_path, -1, tensorboard=True)
    for step in range(1, 7):
        first.write("train", step, {"mlm_loss": float(step), "note": "text", "missing": None})
    values = {"uas": 0.5, "blimp_fields": {"syntax": 0.75}, "uas_relations": {"nsubj": {"accuracy": 0.25}}}
    first.write("evaluation", 3, values)
    first.write("evaluation", 6, values)
    first.close()
    second = Records(tmp_path, 4, tensorboard=True)
    for step in range(5, 8):
        second.write("train", step, {"mlm_loss": 10.0 * step})
    second.close()
    points = scalars(tmp_path)
    assert set(points) == {"train/mlm_loss", "evaluation/uas", "blimp_fields/syntax", "uas_relations/nsubj/accuracy"}
    assert points["train/mlm_loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0), (7, 70.0)]
    assert points["evaluation/uas"] == [(3, 0.5)]
    assert points["uas_relations/nsubj/accuracy"] == [(3, 0.25)]


LOSS, UAS = "train/loss", "evaluation/uas"


def run_until_killed(run, resume, end):
    """Records of a run with an evaluation every 10 steps, left open."""
    records = Records(run, resume, tensorboard=True)
    records.write("event", max(resume, 0), {"event": "start"})
    for step in range(resume + 1, end + 1):
        records.write("train", step, {"loss": float(step)})
        if step % 10 == 0:
            records.write("evaluation", step, {"uas": step / 64})
        if step == 33:
            records.write("evaluation", step, {"once": 1.0})
    records.flush()
    return records


def expected_points(end):
    steps = range(end + 1)
    return {LOSS: [(s, float(s)) for s in steps], UAS: [(s, s / 64) for s in steps if s % 10 == 0]}


class Page:
    """A TensorBoard server over all runs in `directory`."""

    def __init__(self, directory, *arguments):
        port = free_port()
        self.address = f"http://127.0.0.1:{port}/data/plugin/scalars"
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", directory, "--port", str(port)]
        self.process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--reload_interval", "1", *arguments], stderr=subprocess.DEVNULL
        )

    def points(self):
        """What the page shows of its run, by tag."""
        ((run, tags),) = self._read("tags").items()
        series = {tag: self._read("scalars", run=run, tag=tag) for tag in tags}
        return {tag: [(int(step), value) for _, step, value in points] for tag, points in series.items()}

    def shows(self, expected, patience=60):
        """Wait until the page shows just `expected`; returns what it shows in the end."""
        shown, deadline = None, time.monotonic() + patience
        while shown != expected and time.monotonic() < deadline:
            with contextlib.suppress(OSError, ValueError):  # it has not begun, or has read no run
                shown = {tag: points for tag, points in self.points().items() if points}
            time.sleep(0.1)
        return shown

    def _read(self, what, **query):
        with urllib.request.urlopen(f"{self.address}/{what}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)

    def close(self):
        self.process.terminate()
        self.process.wait()


@pytest.mark.slow
def test_every_tensorboard_shows_the_resumed_run_alone(tmp_path):
    """Killed after step 37 and resumed from 20: both loaders of the page, also of one that is open meanwhile."""
    run, loaders = tmp_path / "run", ((), ("--load_fast=false",))
    killed = run_until_killed(run, -1, 37)
    with contextlib.ExitStack() as stack:

        def open_pages():
            return [stack.enter_context(contextlib.closing(Page(tmp_path, *loader))) for loader in loaders]

        before = open_pages()
        past = expected_points(37) | {"evaluation/once": [(33, 1.0)]}
        assert [page.shows(past) for page in before] == [past, past]
        resumed = run_until_killed(run, 20, 23)
        now = expected_points(23)
        assert [page.shows(now) for page in open_pages()] == [now, now]
        default, slow = before
        assert slow.shows(now) == now
        # The default loader keeps a tag of which nothing is left.
        assert default.shows(now | {"evaluation/once": [(33, 1.0)]})[UAS] == now[UAS]
    resumed.close()
    killed.close()
    assert scalars(run) == now


def test_tensorboard_is_cut_back_after_any_number_of_kills(tmp_path):
    """Also to a step before the last resume, twice to the same one, and with TensorBoard off meanwhile."""
    run = tmp_path / "run"
    for resume, end in ((-1, 5), (-1, 37), (20, 33), (30, 36), (10, 34), (10, 25), (25, 31)):
        run_until_killed(run, resume, end).close()
        once = {"evaluation/once": [(33, 1.0)]} if end >= 33 else {}
        assert scalars(run) == expected_points(end) | once
    Records(run, 20, tensorboard=False).close()
    assert scalars(run) == expected_points(20)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    run_until_killed(copy, 15, 22).close()
    assert scalars(copy) == expected_points(22)


@pytest.mark.parametrize("call", ["fsync", "replace", "truncate"])
def test_tensorboard_is_cut_back_though_killed_while_it_is(tmp_path, monkeypatch, call):
    run_until_killed(tmp_path, -1, 37).close()

    def die(*_):
        raise KeyboardInterrupt  # which nothing catches

    (tmp_path / "metrics.jsonl").unlink()  # whose cutting calls the same
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, call, die)
        Records(tmp_path, 20, tensorboard=True)
    run_until_killed(tmp_path, 20, 23).close()
    assert scalars(tmp_path) == expected_points(23)


def test_a_full_disk_while_tensorboard_is_cut_back_loses_nothing(tmp_path, monkeypatch):
    run_until_killed(tmp_path, -1, 37).close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    before = scalars(tmp_path)

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "metrics.jsonl").unlink()  # whose cutting calls the same
    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        patch.setattr(os, "fsync", fail)
        Records(tmp_path, 20, tensorboard=True)
    assert scalars(tmp_path) == before
    run_until_killed(tmp_path, 20, 23).close()
    assert scalars(tmp_path) == expected_points(23)


def test_tensorboard_goes_on_after_a_torn_or_damaged_file(tmp_path, capsys):
    """Of a damaged file no reader has what follows."""
    run_until_killed(tmp_path, -1, 20).close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    content = path.read_bytes()
    for torn in (1, 5, 13, 30):
        path.write_bytes(content[:-torn])
        run_until_killed(tmp_path, 15, 18).close()
        assert scalars(tmp_path) == expected_points(18)
        assert capsys.readouterr().err == ""
        for other in (tmp_path / "tensorboard").iterdir():
            other.unlink()
    tag = content.index(LOSS.encode(), len(content) // 2)
    path.write_bytes(content[: tag - 1] + b"\xff" + content[tag:])  # the length of the tag
    Records(tmp_path, 15, tensorboard=False).close()
    assert f"{path}: dropped " in capsys.readouterr().err
    points = scalars(tmp_path)[LOSS]
    assert points == expected_points(len(points) - 1)[LOSS] and 5 < len(points) < 15


@pytest.mark.parametrize("linked", ["file", "directory"])
def test_links_to_another_runs_tensorboard_are_not_followed(tmp_path, linked):
    other, run = tmp_path / "other", tmp_path / "run"
    run_until_killed(other, -1, 37).close()
    (path,) = (other / "tensorboard").iterdir()
    before = path.read_bytes()
    if linked == "file":
        (run / "tensorboard").mkdir(parents=True)
        (run / "tensorboard" / path.name).symlink_to(path)
    else:
        run.mkdir()
        (run / "tensorboard").symlink_to(other / "tensorboard")
    Records(run, 20, tensorboard=False).close()
    assert path.read_bytes() == before and list((other / "tensorboard").iterdir()) == [path]
