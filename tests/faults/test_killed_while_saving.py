"""kill -9 at the moments around each change of the file system that a save makes: the run goes on from a whole one."""

from __future__ import annotations

import random

import pytest
from engine_runs import largest_difference, moments, records, weights

from megatron_sas.engine.checkpoint import newest_checkpoint
from megatron_sas.metrics.records import read_records
from megatron_sas.model.pretrained import verify_checkpoint

pytestmark = pytest.mark.slow

STEPS = 48
RUN = {
    "train.steps": STEPS,
    "checkpoint.every": 2,
    "checkpoint.keep_last": 1,
    "snapshots.every": 4,
    "evaluation.every": 16,
    "logging.every": 3,
}
POINTS = {0: 130, 1: 16}  # of two saves in a row: rank 0 (with a snapshot, the description, publishing), other ranks


def check_after_kill(run):
    for path in (run / "checkpoints").glob("step_*"):
        verify_checkpoint(path)
    newest_checkpoint(run, pytest.fail)
    read_records(run / "metrics.jsonl")
    for snapshot in (run / "snapshots").glob("step_*"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in snapshot.iterdir()}


def killed_over_and_over(zygote, config, run, kills, ranks):
    """Start the run once for each (rank, point) of `kills`, and to its end after that."""
    done = 0
    for rank, point in kills:
        wound = {"kill_at": point, "rank": rank, "from_step": 1}
        job = zygote.start(config, run, RUN, ranks=ranks, wound=wound)
        codes = job.wait_as_launchers_do()
        if codes == [0] * ranks:  # so near the end that the point never came
            break
        assert -9 in codes, job.output()
        check_after_kill(run)
        done += 1
    zygote.train(config, run, RUN, ranks=ranks)
    return done


@pytest.fixture(scope="module")
def wholes(zygote, config, tmp_path_factory):
    """The same runs without a kill, with one process and with two."""
    directory = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        zygote.train(config, directory / str(ranks), RUN, ranks=ranks)
    return directory


def check_at_the_end(run, whole):
    assert largest_difference(weights(run, STEPS), weights(whole, STEPS)) == 0.0
    assert largest_difference(moments(run, STEPS), moments(whole, STEPS)) == 0.0
    for kind in ("train", "evaluation"):
        assert records(run, kind) == records(whole, kind)
    assert sorted(records(run)) == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", f"step_{STEPS:08d}"]
    names = [path.name for path in (run / "snapshots").glob("step_*")]
    assert sorted(names) == [f"step_{step:08d}" for step in range(0, STEPS + 1, 4)]


def spread(count, points, seed):
    """`count` points, one from each of as many equal parts of the whole, in random order."""
    chance = random.Random(seed)
    parts = [chance.randint(1 + points * i // count, points * (i + 1) // count) for i in range(count)]
    chance.shuffle(parts)
    return parts


def test_one_process(zygote, config, wholes, tmp_path):
    kills = [(0, point) for point in spread(7, POINTS[0], seed=1)]
    assert killed_over_and_over(zygote, config, tmp_path / "run", kills, ranks=1) >= 6
    check_at_the_end(tmp_path / "run", wholes / "1")


def test_two_processes(zygote, config, wholes, tmp_path):
    kills = [(0, point) for point in spread(2, POINTS[0], seed=2)] + [(1, point) for point in spread(2, POINTS[1], 3)]
    assert killed_over_and_over(zygote, config, tmp_path / "run", kills, ranks=2) >= 3
    check_at_the_end(tmp_path / "run", wholes / "2")


@pytest.mark.full
@pytest.mark.parametrize("part", range(10))
def test_every_point(zygote, config, wholes, tmp_path, part):
    """Every point of rank 0 and of rank 1; a tenth of them in each run, because a kill costs up to two updates."""
    for ranks in (1, 2):
        kills = [(rank, n) for rank in range(ranks) for n in range(1 + part, POINTS[rank] + 1, 10)]
        run = tmp_path / str(ranks)
        assert killed_over_and_over(zygote, config, run, kills, ranks) >= len(kills) - 1
        check_at_the_end(run, wholes / str(ranks))
