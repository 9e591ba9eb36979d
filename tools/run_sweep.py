"""Run a sweep: the conditions of an experiment × seeds, here or as a Slurm array, restartable."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil

import _checkout
from megatron_sas.core.cli import InputError, progress, run_main
from megatron_sas.core.directory_lock import DirectoryLock
from megatron_sas.run.directory import RunDirectory
from megatron_sas.run.records import read_records
from megatron_sas.run.signals import signals_to_heed

if TYPE_CHECKING:
    from megatron_sas.experiments.sweep import PlannedRun, Sweep

ROOT = Path(__file__).resolve().parents[1]

DESCRIPTION = """\
Train every condition of SWEEP.yaml with every seed. The run of a condition lives in DIR/CONDITION/seed-N, its output in
DIR/logs. Started again, the same command continues what is unfinished and leaves alone what is finished; conditions and
seeds may be added to the file. Fields given as --section.field value hold for all runs. At the end a table is printed;
`tools/analyze_trajectory.py DIR --output REPORT` makes the report."""

EPILOG = """\
on a cluster:
  %(prog)s SWEEP.yaml --output DIR --slurm examples/slurm/sweep.sbatch
submits the unfinished runs as one array, and those that branch from one of them as an array that waits for that one.
The batch script is started with SWEEP.yaml, DIR, the names of its array's runs (joined by commas) and the fields that
hold for all runs; it asks for the arguments of a run with --arguments NAME."""

POLL_SECONDS = 1.0
GRACE_SECONDS = 60.0  # for a run that has trained nothing yet to end by itself; torchrun gives its workers 30


def main() -> int:
    arguments, overrides = parse_arguments()
    from megatron_sas.experiments.sweep import plan_sweep

    directory: Path = arguments.output
    sweep = plan_sweep(arguments.sweep, directory, overrides)
    if arguments.arguments is not None:
        print("\n".join(trainer_arguments(sweep, _named(sweep, arguments.arguments, arguments.sweep))))
        return 0
    if arguments.list:
        for run in sweep.runs:
            state = "finished" if run.finished else f"{run.steps_done} of {run.config.train.steps} updates"
            print(f"{run.name:32} {state}")
        return 0
    with contextlib.closing(DirectoryLock(directory, "wait for it or choose another --output")) as lock:
        lock.take()
        sweep.write(directory)
        if arguments.slurm is not None:
            return submit(sweep, arguments, overrides)
        failed = run_here(sweep, directory, arguments.jobs, arguments.processes)
    print(table(sweep.runs))
    return 1 if failed else 0


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="see examples/experiments")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="directory of all runs")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: as many as GPUs suffice for, or 1)"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes, and GPUs, of each run (default: 1)"
    )
    parser.add_argument("--list", action="store_true", help="only list the runs, by name, and how far they are")
    parser.add_argument(
        "--arguments", metavar="NAME", help="only print the trainer's arguments for one run, CONDITION/seed-N"
    )
    parser.add_argument(
        "--slurm", type=Path, metavar="SCRIPT", help="submit a Slurm array of this batch script instead"
    )
    arguments, overrides = parser.parse_known_args()
    for name in ("jobs", "processes"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return arguments, overrides


def trainer_arguments(sweep: Sweep, run: PlannedRun) -> list[str]:
    """The command line of `pretrain_mlm.py`."""
    return ["--config", str(sweep.config_path), *run.arguments]


def run_here(sweep: Sweep, directory: Path, jobs: int | None, processes: int) -> list[PlannedRun]:
    """Make all unfinished runs on this machine; returns those that failed.

    A signal that would stop one of them (`signals_to_heed`) has the running ones save a checkpoint and end.
    """
    devices = _devices()
    jobs = jobs or max(1, len(devices) // processes)
    if devices and jobs * processes > len(devices):
        raise InputError(f"--jobs {jobs} × --processes {processes}: there are {len(devices)} GPUs; lower one of them")
    free = [devices[i * processes : (i + 1) * processes] for i in range(jobs)]
    waiting = [run for run in sweep.runs if not run.finished]
    running: dict[subprocess.Popen, Running] = {}
    failed: list[PlannedRun] = []
    stopping = Stopping()
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    total = sum(run.config.train.steps for run in sweep.runs)
    done = {run.directory: run.steps_done for run in sweep.runs}
    with _listening() as asked, progress(total=total, unit="step", desc="sweep") as bar:
        while running or (waiting and not asked):
            while free and not asked and (run := _next(waiting, running)):
                started = Running(run, free.pop(), _log_path(run, directory))
                running[_start(sweep, started, jobs, processes)] = started
            if asked:
                for process, started in running.items():
                    stopping.ask(process, started.run.directory)
            time.sleep(POLL_SECONDS)
            for process in [p for p in running if p.poll() is not None]:
                ended = running.pop(process)
                run = ended.run
                stopping.ended(process)
                free.append(ended.gpus)
                done[run.directory] = run.steps_done
                _log(ended.outcome(process.returncode, stopped=bool(asked)), bar)
                if not run.finished and not asked:
                    lost = _branches_lost(run, waiting)
                    failed += [run, *lost]
                    for branch in lost:
                        _log(f"{branch.name}: not started, because {run.name} failed", bar)
            done |= {started.run.directory: started.run.steps_done for started in running.values()}
            bar.n = sum(done.values())
            bar.refresh()
    if asked:
        print("stopped; the same command continues", file=sys.stderr)
        return [run for run in sweep.runs if not run.finished]
    return failed


class Running:
    """A run that is being made, on which GPUs, and its log, which earlier attempts have begun."""

    def __init__(self, run: PlannedRun, gpus: list[str], log: Path) -> None:
        self.run, self.gpus, self.log = run, gpus, log
        self._begin = log.stat().st_size if log.exists() else 0

    def outcome(self, code: int, stopped: bool) -> str:
        """How it ended, in words."""
        if self.run.finished:
            return f"{self.run.name}: finished"
        if stopped:
            return f"{self.run.name}: stopped after {self.run.steps_done} updates"
        lines = self.log.read_bytes()[self._begin :].decode(errors="replace").strip().splitlines()
        last = next((text for text in reversed(lines) if "error" in text.lower()), lines[-1] if lines else "no output")
        signals = {number.value: number.name for number in signal.Signals}
        how = f"failed with exit code {code}" if code >= 0 else f"was killed by {signals.get(-code, f'signal {-code}')}"
        return f"{self.run.name}: {how} ({last}); see {self.log}"


@contextlib.contextmanager
def _listening() -> Iterator[list[int]]:
    """The signals that asked to stop, as they arrive."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in signals_to_heed()}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _devices() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them; [] on a machine without any."""
    import torch

    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _branches_lost(run: PlannedRun, waiting: list[PlannedRun]) -> list[PlannedRun]:
    """Take out of `waiting`, and return, what cannot branch from a run that failed, and the branches of these in turn.

    Branches whose checkpoint it had saved before can be made all the same.
    """
    lost = []
    for other in [other for other in waiting if other.parent == run.directory]:
        if not Path(other.config.run.branch_from).is_dir():
            waiting.remove(other)
            lost += [other, *_branches_lost(other, waiting)]
    return lost


def _next(waiting: list[PlannedRun], running: dict[subprocess.Popen, Running]) -> PlannedRun | None:
    """Take the first run out of `waiting` that need not wait for another."""
    busy = {run.directory for run in waiting} | {started.run.directory for started in running.values()}
    for run in waiting:
        if run.parent not in busy:
            waiting.remove(run)
            return run
    return None


def _start(sweep: Sweep, started: Running, jobs: int, processes: int) -> subprocess.Popen:
    environment = dict(os.environ)
    if started.gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(started.gpus)
    threads = max(1, len(os.sched_getaffinity(0)) // (jobs * processes))
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    launcher = [sys.executable]
    if processes > 1:  # --standalone finds a free port, so that several runs do not meet
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with started.log.open("a") as log:
        return subprocess.Popen(
            [*launcher, str(ROOT / "pretrain_mlm.py"), *trainer_arguments(sweep, started.run)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this program, which then stops the runs in order
        )


class Stopping:
    """Ends running trainers in order, and whatever they have started."""

    def __init__(self, grace: float = GRACE_SECONDS) -> None:
        self.grace = grace
        self._since: dict[int, float] = {}  # when a process got its SIGTERM
        self._descendants: dict[int, set[psutil.Process]] = {}

    def ask(self, process: subprocess.Popen, run_dir: Path) -> None:
        """Ask a trainer to save and end, by the stop file, which works under every launcher; call it until it ended.

        Where nothing is trained yet there is nobody to look for a file: SIGTERM, which torchrun passes on to its
        workers, and when that has not helped for `grace` seconds, SIGKILL to all. The workers are in sessions of their
        own, so a signal to the launcher's process group does not reach them.
        """
        if RunDirectory(run_dir).records.exists():
            RunDirectory(run_dir).stop.touch()
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
            self._descendants.setdefault(process.pid, set()).update(children)
        if process.pid not in self._since:
            self._since[process.pid] = time.monotonic()
            process.terminate()
        elif time.monotonic() - self._since[process.pid] > self.grace:
            process.kill()

    def ended(self, process: subprocess.Popen) -> None:
        """Kill what a trainer that was sent a SIGTERM has left behind."""
        for left in self._descendants.pop(process.pid, ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def _log_path(run: PlannedRun, directory: Path) -> Path:
    return directory / "logs" / f"{run.condition}-{run.directory.name}.log"


def _log(line: str, bar: progress) -> None:
    bar.write(line, file=sys.stderr) if not bar.disable else print(line, flush=True)


def _named(sweep: Sweep, name: str, path: Path) -> PlannedRun:
    for run in sweep.runs:
        if run.name == name:
            return run
    raise InputError(f"--arguments {name}: {path} has no such run now; --list shows those it has")


def submit(sweep: Sweep, arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Submit the unfinished runs as Slurm arrays: one of those that can start, and one of each run's branches.

    The names of its runs are part of an array's command line, which Slurm keeps: the sweep file, where places shift
    when a condition is added, may change while elements wait or are requeued.
    """
    logs = arguments.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    unfinished = {run.directory: run for run in sweep.runs if not run.finished}
    arrays: dict[Path | None, list[PlannedRun]] = {}  # by the run to wait for, which stands in an array before
    for run in unfinished.values():
        arrays.setdefault(run.parent if run.parent in unfinished else None, []).append(run)
    elements: dict[Path, str] = {}
    for parent, runs in arrays.items():
        command = ["sbatch", "--parsable", f"--array=0-{len(runs) - 1}"]
        # Not afterok: what waits for a run that fails would stay in the queue for ever. The checkpoint may be there all
        # the same; if it is not, the trainer says so, and the next submission has the branch again.
        command += [f"--dependency=afterany:{elements[parent]}"] if parent else []
        command += [f"--output={logs / 'slurm-%A_%a.out'}", str(arguments.slurm), str(arguments.sweep)]
        command += [str(arguments.output), ",".join(run.name for run in runs), *overrides]
        try:
            job = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip().split(";")[0]
        except FileNotFoundError:
            raise InputError("sbatch: not found; --slurm works where Slurm is") from None
        except subprocess.CalledProcessError as error:
            raise InputError(
                f"sbatch refused the array (exit code {error.returncode}); see its message above"
            ) from None
        for index, run in enumerate(runs):
            elements[run.directory] = f"{job}_{index}"
            print(f"submitted {job}_{index}: {run.name}" + (f", after {elements[parent]}" if parent else ""))
    return 0


def table(runs: Sequence[PlannedRun]) -> str:
    """The last evaluation of the finished runs: mean and standard error by condition."""
    from megatron_sas.evaluation.registry import live_metrics

    columns = {metric.key: metric.title for metric in live_metrics() if metric.title}
    conditions: dict[str, list[PlannedRun]] = {}
    for run in runs:
        conditions.setdefault(run.condition, []).append(run)
    width = max(len("condition"), *map(len, conditions))
    lines = [f"{'condition':{width}}  runs  " + "  ".join(f"{title:>16}" for title in columns.values())]
    for condition, group in conditions.items():
        finished = [read_records(RunDirectory(run.directory).records) for run in group if run.finished]
        last = [[r for r in records if r["kind"] == "evaluation"][-1:] for records in finished]
        cells = []
        for key in columns:
            values = [r[key] for records in last for r in records if r.get(key) is not None]
            error = f" ± {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{error}" if values else "-")
        lines.append(
            f"{condition:{width}}  {len(finished)}/{len(group)}  " + "  ".join(f"{cell:>16}" for cell in cells)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
