"""Faults put into a training process before it starts, by replacing functions of the modules it uses.

A write point is a moment before, in the middle of, or after a call that changes the file system. They are counted from
the moment at which the checkpoint of a given step begins (-1: from the start), in all threads. Their names say what is
done to which file of the run, without steps and what is drawn at random, so that they are the same in every save.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file


def inject(what: dict[str, Any], rank: int) -> None:
    """Prepare this process: {"kill_at": number or name | "points": file, "from_step": s, "run": directory},
    {"batches": file} or {"hold": arguments of `_hold`}, with "rank": r on that rank alone; {"drop_at": s} has the
    records say that the loss fell then; {"directories": d} has each rank work in d/RANK; {"environment": {...}} sets
    variables."""
    if "environment" in what:
        os.environ.update(what["environment"])
        tempfile.tempdir = None  # of TMPDIR
    if "drop_at" in what:
        _tell_of_a_drop(what["drop_at"])
    if what.get("rank", rank) != rank:
        return
    if "from_step" in what:
        names = Path(f"{what['points']}-{rank}") if "points" in what else None
        _WritePoints(what.get("kill_at"), names, what["from_step"], what.get("run", "/"))
    if "directories" in what:
        os.chdir(Path(what["directories"], str(rank)))
    if "batches" in what:
        _write_down_batches(Path(f"{what['batches']}-{rank}"))
    if "hold" in what:
        _hold(**what["hold"])


def _hold(before: str, until: str, call: int = 1) -> None:
    """Before a call, counted from 1, of "module:Class.name": make the file `until`-reached, then wait for `until`."""
    module, _, name = before.partition(":")
    *path, name = name.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), itertools.count(1)

    def held(*arguments: object, **options: object) -> object:
        if next(calls) == call:
            Path(f"{until}-reached").touch()
            while not os.path.exists(until):
                time.sleep(0.01)
        return function(*arguments, **options)

    setattr(owner, name, held)


def _tell_of_a_drop(start: int) -> None:
    """A loss with a little noise that falls by 1 within 4 steps, for a watch to find; training is not touched."""
    from megatron_sas.train import step_log

    read = step_log.read_pending

    def read_and_replace(pending: list, *arguments: object) -> list[dict]:
        lines = read(pending, *arguments)
        for entry, values in zip(pending, lines, strict=True):
            values["mlm_loss"] = 5.0 - min(max(entry.step - start, 0) / 4, 1.0) + 0.01 * (entry.step * 7 % 5)
        return lines

    step_log.read_pending = read_and_replace


def _write_down_batches(path: Path) -> None:
    """A line for every micro-batch that is trained on: step, number, and a hash of all that it holds."""
    from megatron_sas.train.step import Engine

    update = Engine.update

    def update_and_write(engine: Engine, window: object, *arguments: object) -> object:
        with open(path, "a") as file:
            for batch in window.micro_batches:
                content = b"".join(
                    tensor.numpy().tobytes()
                    for tensor in (batch.sample_ids, batch.input_ids, batch.masked_positions, batch.labels, batch.heads)
                )
                file.write(f"{window.step} {batch.index} {hashlib.sha256(content).hexdigest()}\n")
        return update(engine, window, *arguments)

    Engine.update = update_and_write


class _WritePoints:
    """Counts write points; kills the process at one of them, or writes down their names, each once."""

    def __init__(self, kill_at: int | str | None, names: Path | None, from_step: int, run: str) -> None:
        from megatron_sas.run import reading as pretrained
        from megatron_sas.run import saver as saving

        self.kill_at, self.names, self.run, self.active = kill_at, names, run, from_step < 0
        self.number, self.seen = 0, set()
        self.lock = threading.Lock()
        begin = saving.Saver.begin

        def begin_and_count(saver: object, step: int, *arguments: object, **options: object) -> None:
            self.active |= step >= from_step
            begin(saver, step, *arguments, **options)

        saving.Saver.begin = begin_and_count
        for name in ("replace", "fsync", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self._around(name, getattr(os, name)))
        os.write = self._torn_write(os.write)
        pretrained.save_file = self._torn_file

    def point(self, name: str) -> None:
        """Be at a write point."""
        if not self.active:
            return
        with self.lock:
            self.number += 1
            if self.kill_at in (self.number, name):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.names is not None and name not in self.seen:
                self.seen.add(name)
                with open(self.names, "a") as file:
                    file.write(f"{name}\n")

    def _around(self, name: str, call: Callable) -> Callable:
        def faulty(target: object, *arguments: object, **options: object) -> object:
            what = f"{name} {self._place(target, options.get('dir_fd'))}"
            self.point(f"before {what}")
            result = call(target, *arguments, **options)
            self.point(f"after {what}")
            return result

        return faulty

    def _place(self, target: object, directory: int | None = None) -> str:
        """A path or descriptor, maybe relative to a directory's descriptor, as part of a name."""
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        elif directory is not None:
            target = Path(os.readlink(f"/proc/self/fd/{directory}"), target)
        path = os.path.relpath(target, self.run)
        return re.sub(r"\.[a-z0-9_]{8}\.tmp", ".tmp", re.sub(r"step_\d+", "step", path))

    def _torn_write(self, write: Callable) -> Callable:
        def faulty(descriptor: int, content: bytes) -> int:
            if bytes(content[:7]) != b'{"kind"':  # maybe a memory view
                return write(descriptor, content)
            self.point("before a record")
            if self.active and self.kill_at in (self.number + 1, "in a record"):
                write(descriptor, content[: len(content) // 2])
            self.point("in a record")
            return write(descriptor, content)

        return faulty

    def _torn_file(self, tensors: dict, path: Path, metadata: dict) -> None:
        what = f"writing {self._place(path)}"
        self.point(f"before {what}")
        save_file(tensors, path, metadata=metadata)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        self.point(f"in {what}")
        path.write_bytes(content)
        self.point(f"after {what}")
