"""Records: whole lines, valid JSON, exact cut on resume, TensorBoard points without overlap."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
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
    for method, action in (
        ("add_scalar", lambda: records.write("train", 1, {"loss": 1.0})),
        ("flush", records.flush),
        ("close", records.close),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(records._board, method, fail)
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
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {tag: [(point.step, point.value) for point in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


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
