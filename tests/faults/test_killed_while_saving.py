"""kill -9 at the moments around each change of the file system that a save makes: the run goes on from a whole one."""

from __future__ import annotations

import random

import pytest
from engine_runs import largest_difference, moments, records, weights

from megatron_sas.run.checkpoint import newest_checkpoint
from megatron_sas.run.reading import verify_checkpoint
from megatron_sas.run.records import read_records

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
PARTS = 10  # a point costs at most the 4 updates between two snapshots, so that a run has time for 12


def check_after_kill(run):
    for path in (run / "checkpoints").glob("step_*"):
        verify_checkpoint(path)
    newest_checkpoint(run, pytest.fail)
    read_records(run / "metrics.jsonl")
    for snapshot in (run / "snapshots").glob("step_*"):
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in snapshot.iterdir()}


def killed_over_and_over(fork_server, config, run, kills, ranks):
    """Start the run once for each (rank, point) of `kills`, and to its end after that."""
    for rank, point in kills:
        fault = {"kill_at": point, "rank": rank, "from_step": 1, "run": str(run)}
        job = fork_server.start(config, run, RUN, ranks=ranks, fault=fault)
        assert job.wait_as_launchers_do()[rank] == -9, f"rank {rank}, {point}\n{job.output()}"
        check_after_kill(run)
    fork_server.train(config, run, RUN, ranks=ranks)


@pytest.fixture(scope="module")
def wholes(fork_server, config, tmp_path_factory):
    """The same runs without a kill, with one process and with two, which also write down their write points."""
    directory = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        run = directory / str(ranks)
        fault = {"points": str(directory / f"points-{ranks}"), "from_step": 1, "run": str(run)}
        job = fork_server.start(config, run, RUN, ranks=ranks, fault=fault)
        assert job.wait() == [0] * ranks, job.output()
    return directory


def points(wholes, ranks, rank):
    """The names of the points that a rank comes by while it saves."""
    names = (wholes / f"points-{ranks}-{rank}").read_text().splitlines()
    chance = "after mkdir checkpoints/.step.tmp"  # of two processes the first that comes makes it
    return [name for name in names if ranks == 1 or name != chance]


def check_at_the_end(run, whole):
    assert largest_difference(weights(run, STEPS), weights(whole, STEPS)) == 0.0
    assert largest_difference(moments(run, STEPS), moments(whole, STEPS)) == 0.0
    for kind in ("train", "evaluation"):
        assert records(run, kind) == records(whole, kind)
    assert sorted(records(run)) == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", f"step_{STEPS:08d}"]
    names = [path.name for path in (run / "snapshots").glob("step_*")]
    assert sorted(names) == [f"step_{step:08d}" for step in range(0, STEPS + 1, 4)]


def spread(count, names, seed):
    """`count` of the names, one from each of as many equal parts of the list, in random order."""
    chance, size = random.Random(seed), len(names)
    chosen = [chance.choice(names[size * i // count : size * (i + 1) // count]) for i in range(count)]
    chance.shuffle(chosen)
    return chosen


def test_one_process(fork_server, config, wholes, tmp_path):
    kills = [(0, point) for point in spread(7, points(wholes, 1, 0), seed=1)]
    killed_over_and_over(fork_server, config, tmp_path / "run", kills, ranks=1)
    check_at_the_end(tmp_path / "run", wholes / "1")


def test_two_processes(fork_server, config, wholes, tmp_path):
    kills = [(rank, point) for rank in (0, 1) for point in spread(2, points(wholes, 2, rank), seed=2 + rank)]
    killed_over_and_over(fork_server, config, tmp_path / "run", kills, ranks=2)
    check_at_the_end(tmp_path / "run", wholes / "2")


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
def test_every_point(fork_server, config, wholes, tmp_path, part):
    """Every point of one process and of either of two; a tenth of them in each run."""
    for ranks in (1, 2):
        kills = [(rank, point) for rank in range(ranks) for point in points(wholes, ranks, rank)]
        assert 100 < len(kills) <= 12 * PARTS
        run = tmp_path / str(ranks)
        killed_over_and_over(fork_server, config, run, kills[part::PARTS], ranks)
        check_at_the_end(run, wholes / str(ranks))
