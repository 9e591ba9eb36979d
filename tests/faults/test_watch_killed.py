"""The watch under kill -9: whenever it comes, the same onset at the same step, and the same snapshots kept."""

from __future__ import annotations

import pytest
from engine_runs import largest_difference, records
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sas.run.records import read_records

pytestmark = pytest.mark.slow

WATCH = {
    "train.steps": 40,
    "checkpoint.every": 5,
    "checkpoint.keep_last": 1,
    "evaluation.every": 40,
    "logging.every": 3,
    "logging.tensorboard": True,
    "watch.metrics": ["loss"],
    "watch.delta": 4,
    "watch.every": 2,
    "watch.keep": 5,
    "watch.after": 6,
}
DROP = 20
KEPT = [12, 14, 16, 18, 20, 22, 24, 26]  # the loss falls from step 20 on, which shows at step 21
POINTS = 120  # write points from the save of step 20 on, until the ring has moved and step 22 is saved


def onsets(run):
    lines = [line for line in read_records(run / "metrics.jsonl") if line.get("event") == "onset_detected"]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def models(directory):
    return {int(path.name[5:]): load_file(path / "model.safetensors") for path in directory.glob("step_*")}


def train(fork_server, config, run, **more):
    job = fork_server.start(config, run, {**WATCH, **more.pop("overrides", {})}, fault={"drop_at": DROP}, **more)
    assert set(job.wait(120)) == {0}, job.output()
    return job.output()


@pytest.fixture(scope="module")
def whole(fork_server, config, tmp_path_factory):
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert "onset of loss detected" in train(fork_server, config, run)
    return run


def check_whole(run):
    (event,) = onsets(run)
    assert event["step"] == 21 and event["metric"] == "loss"
    assert event["strength"] > event["threshold"] > 0
    assert event["snapshots"] == [s for s in KEPT if s < event["step"]]
    assert sorted(models(run / "snapshots")) == KEPT
    ring = models(run / "ring")
    assert min(ring) >= 28 and max(ring) == 40 and len(ring) <= 2 * WATCH["watch.keep"]
    assert not list((run / "ring").glob(".*")) and not list((run / "snapshots").glob(".*"))


def test_the_ring_is_kept_around_an_onset(whole):
    check_whole(whole)
    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert [point.step for point in board.Scalars("event/strength")] == [21]


@pytest.mark.full
def test_two_processes_agree(fork_server, config, tmp_path):
    train(fork_server, config, tmp_path / "run", ranks=2, overrides={"train.zero_stage": 3})
    check_whole(tmp_path / "run")


def kill_and_go_on(fork_server, config, run, whole, points):
    """Kill at each point in turn, with what the kill before has left; then compare with `whole`."""
    kills = 0
    for point in points:
        fault = {"drop_at": DROP, "kill_at": point, "from_step": 20}
        job = fork_server.start(config, run, WATCH, fault=fault)
        code = job.wait()[0]
        if code == 0:
            break
        assert code == -9, job.output()
        kills += 1
        for model in [*run.glob("ring/step_*"), *run.glob("snapshots/step_*")]:
            assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in model.iterdir()}
    train(fork_server, config, run)
    assert onsets(run) == onsets(whole)
    assert records(run) == records(whole)
    for name in ("ring", "snapshots"):
        mine, theirs = models(run / name), models(whole / name)
        assert sorted(mine) == sorted(theirs)
        assert all(largest_difference(mine[step], theirs[step]) == 0.0 for step in mine)
    return kills


def test_killed_around_the_onset(fork_server, config, whole, tmp_path):
    """While the ring moves, and, going on from before that, again while the event is written or the ring moves."""
    assert kill_and_go_on(fork_server, config, tmp_path / "run", whole, [89, 82]) == 2


@pytest.mark.full
def test_killed_at_every_point(fork_server, config, whole, tmp_path):
    for point in range(1, POINTS):
        kill_and_go_on(fork_server, config, tmp_path / str(point), whole, [point])
    assert kill_and_go_on(fork_server, config, tmp_path / "again", whole, range(1, POINTS, 4)) > 20
