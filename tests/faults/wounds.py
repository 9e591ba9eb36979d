"""Faults put into a training process before it starts, by replacing functions of the modules it uses.

A write point is a moment before, in the middle of, or after a call that changes the file system. They are counted from
the moment at which the checkpoint of a given step begins (-1: from the start), in all threads.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file


def wound(what: dict[str, Any], rank: int) -> None:
    """Prepare this process: {"kill_at": n | "count": file, "from_step": s, "rank": r}, or {"batches": file}; and
    {"drop_at": s} has the records say that the loss fell then, on every rank."""
    if "drop_at" in what:
        _tell_of_a_drop(what["drop_at"])
    if what.get("rank", rank) != rank:
        return
    if "from_step" in what:
        _WritePoints(what.get("kill_at"), what.get("count"), what["from_step"])
    if "batches" in what:
        _write_down_batches(Path(f"{what['batches']}-{rank}"))


def _tell_of_a_drop(start: int) -> None:
    """A loss with a little noise that falls by 1 within 4 steps, for a watch to find; training is not touched."""
    from megatron_sas.engine import trainer

    read = trainer.read_pending

    def read_and_replace(pending: list, *arguments: object) -> list[dict]:
        lines = read(pending, *arguments)
        for entry, values in zip(pending, lines, strict=True):
            values["mlm_loss"] = 5.0 - min(max(entry.step - start, 0) / 4, 1.0) + 0.01 * (entry.step * 7 % 5)
        return lines

    trainer.read_pending = read_and_replace


def _write_down_batches(path: Path) -> None:
    """A line for every micro-batch that is trained on: step, number, and a hash of all that it holds."""
    from megatron_sas.engine.engine import Engine

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
    """Counts write points; kills the process at one of them, or writes all their names to a file when it ends."""

    def __init__(self, kill_at: int | None, count: str | None, from_step: int) -> None:
        from megatron_sas.engine import saving
        from megatron_sas.model import pretrained

        self.kill_at, self.count, self.names, self.active = kill_at, count, [], from_step < 0
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
            self.names.append(name)
            if self.count is not None:
                Path(self.count).write_text("\n".join(self.names))
            if len(self.names) == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def _around(self, name: str, call: Callable) -> Callable:
        def wounded(*arguments: object, **options: object) -> object:
            target = arguments[0] if isinstance(arguments[0], str | Path) else "…"
            self.point(f"before {name} {target}")
            result = call(*arguments, **options)
            self.point(f"after {name} {target}")
            return result

        return wounded

    def _torn_write(self, write: Callable) -> Callable:
        def wounded(descriptor: int, content: bytes) -> int:
            if not content.startswith(b'{"kind"'):
                return write(descriptor, content)
            self.point("before a record")
            if len(self.names) + 1 == self.kill_at and self.active:
                write(descriptor, content[: len(content) // 2])
            self.point("in a record")
            return write(descriptor, content)

        return wounded

    def _torn_file(self, tensors: dict, path: Path, metadata: dict) -> None:
        self.point(f"before {path.name}")
        save_file(tensors, path, metadata=metadata)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        self.point(f"in {path.name}")
        path.write_bytes(content)
        self.point(f"after {path.name}")
