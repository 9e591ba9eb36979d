"""Measuring the models of a trajectory one after another or several at once, each as a whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed, wait
from pathlib import Path

import torch

from megatron_sas.core.cli import InputError
from megatron_sas.core.device import choose_device
from megatron_sas.core.processes import keep_freed_memory, worker_pool
from megatron_sas.corpus.readers.text_lines import OnError
from megatron_sas.evaluation.provenance import weights_sha256
from megatron_sas.run.reading import load_model
from megatron_sas.trajectory.measure import Inputs, TrajectoryTask, kind_of
from megatron_sas.trajectory.points import is_whole, point_steps, read_point, write_point, writing
from megatron_sas.trajectory.summary import write_summary

Model = tuple[int, Path]
Report = Callable[[str], None]
Tasks = dict[str, tuple[Path, TrajectoryTask]]
"""By kind of models: one of them, and the task for them."""


def measure_models(
    source: Path,
    models: Sequence[Model],
    inputs: Inputs,
    output: Path,
    *,
    tasks: Tasks | None = None,
    pool: Executor | None = None,
    device: str | None = None,
    on_error: OnError = "refuse",
    report: Report = print,
    after_model: Callable[[], None] = lambda: None,
) -> int:
    """Write the points of all `models` that have none yet, then the summary; returns how many models were left out.

    A point of other weights than the model has now is measured again.

    Args:
        source: the run or folder that the models come from.
        inputs, output: what to measure on, and the directory to write.
        tasks: shared by calls with the same inputs: what one has prepared of them serves the next.
        pool: of `measuring_pool`, whose processes measure if there are several models to measure; on a machine with
            several GPUs they take them in turn.
        device: as `choose_device` takes it.
        on_error: end at a model that cannot be read, or pass it over; `report` gets a line about each.
        after_model: called for every model that is done, found done, or passed over.

    Raises:
        InputError: an input is wrong, a model cannot be read (unless these are skipped), `output` is something else or
            was measured on other inputs, or memory does not suffice.
    """
    choose_device(device)
    bad: set[int] = set()

    def leave_out(step: int, fault: str) -> None:
        if on_error == "refuse":
            raise InputError(f"{fault} (--on-error skip passes over such models)")
        report(f"skipped step {step}: {fault}")
        bad.add(step)

    reference, task = _first_task(inputs, models, leave_out, {} if tasks is None else tasks)
    for note in task.notes():
        report(note)
    settings = {"source": os.path.relpath(source.resolve(), output.resolve()), **task.settings()}
    with writing(output, settings):
        _check_not_moved(models, output)
        waiting = []
        for step, path in models:
            if step in bad or _is_measured(output, step, path):
                after_model()
            else:
                waiting.append((step, path))
        if pool is not None and len(waiting) > 1:
            outcomes = _at_once(pool, inputs, reference, waiting, output, device)
        else:
            outcomes = ((step, _measure(task, step, path, output, device)) for step, path in waiting)
        with contextlib.closing(outcomes):  # nothing writes into `output` when this block is over
            for step, fault in outcomes:
                if fault is not None:
                    leave_out(step, fault)
                after_model()
        write_summary(output)
    return len(bad)


def measuring_pool(workers: int) -> contextlib.AbstractContextManager[Executor]:
    """Processes that measure models, for any number of calls of `measure_models`; see `worker_pool`."""
    threads = max(1, torch.get_num_threads() // workers)
    return worker_pool(workers, signal.SIG_DFL, torch.set_num_threads, threads)


def _first_task(
    inputs: Inputs, models: Sequence[Model], leave_out: Callable[[int, str], None], tasks: Tasks
) -> tuple[Path, TrajectoryTask]:
    """The first model that can be read, which decides about tokenizer and shape, and the task for such models.

    If `tasks` has one for such models, it and the model behind it.
    """
    for step, path in models:
        try:
            model, tokenizer = load_model(path)
        except (InputError, OSError) as error:
            leave_out(step, _line(error))
        else:
            kind = kind_of(model.config, tokenizer)
            if kind not in tasks:
                tasks[kind] = path, TrajectoryTask(inputs, model.config, tokenizer)
            return tasks[kind]
    raise InputError(f"none of the {len(models)} models from {models[0][1]} on can be read; give others")


def _measure(task: TrajectoryTask, step: int, path: Path, output: Path, device: str | None) -> str | None:
    """Measure one model and write its point; returns what is wrong with the model, if anything."""
    keep_freed_memory()
    try:
        try:
            model = task.load(path, choose_device(device))
            source = {"model": str(path.resolve()), "model_sha256": weights_sha256(path)}
        except (InputError, OSError) as error:  # not around `measure`: damaged inputs are no fault of the model
            return _line(error)
        values, items = task.measure(model)
    except torch.OutOfMemoryError:
        raise InputError(
            f"{path}: the device's memory does not suffice; use a smaller --batch-tokens or fewer --workers"
        ) from None
    write_point(output, step, {**source, **values}, items)
    return None


def _check_not_moved(models: Sequence[Model], output: Path) -> None:
    """Refuse models that have points at other steps: their names were read in another way, or others follow now.

    Raises:
        InputError: there is such a model; its old point would stand next to the new one.
    """
    steps = {str(path.resolve()): step for step, path in models}
    for old in point_steps(output):
        try:
            path = read_point(output, old).get("model")
        except InputError:  # a damaged point is measured again
            continue
        if (new := steps.get(path, old)) != old:
            raise InputError(f"{output}: has {path} as step {old}, which is step {new} now; choose another --output")


def _is_measured(output: Path, step: int, path: Path) -> bool:
    """Whether the output has a whole point of the very weights that are at `path`."""
    try:
        return is_whole(output, step) and read_point(output, step).get("model_sha256") == weights_sha256(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False  # measuring it says what is wrong


def _line(error: InputError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _at_once(
    pool: Executor, inputs: Inputs, reference: Path, models: Sequence[Model], output: Path, device: str | None
) -> Iterator[tuple[int, str | None]]:
    """(step, fault) of every model as it is done, measured by several processes."""
    gpus = torch.cuda.device_count() if device in (None, "cuda") and torch.cuda.is_available() else 0
    futures = {}
    for number, (step, path) in enumerate(models):
        where = f"cuda:{number % gpus}" if gpus else device
        futures[pool.submit(_measure_in_worker, inputs, reference, step, path, output, where)] = step
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)  # models under way are finished: their points count


@functools.cache
def _task(inputs: Inputs, reference: Path) -> TrajectoryTask:
    """The task of a worker process, made once."""
    model, tokenizer = load_model(reference)
    return TrajectoryTask(inputs, model.config, tokenizer)


def _measure_in_worker(
    inputs: Inputs, reference: Path, step: int, path: Path, output: Path, device: str | None
) -> str | None:
    return _measure(_task(inputs, reference), step, path, output, device)
