"""What a run reports: records in its files, lines on the screen, and a progress bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from megatron_sas.core import distributed
from megatron_sas.core.cli import progress
from megatron_sas.run.records import Records

Observer = Callable[[str, int, dict[str, Any]], None]


class Journal:
    """Rank 0 writes and prints. On the other ranks every method but `evaluated` does nothing.

    `records` is rank 0's, once the run has begun. `observers` are called with (kind, step, values) of every record.
    """

    def __init__(self) -> None:
        self.records: Records | None = None
        self.observers: list[Observer] = []
        self._bar = progress(disable=True)

    def log(self, line: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if not distributed.is_main():
            return
        if self._bar.disable:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write a record of `kind` "train", "evaluation" or "event"."""
        if self.records is not None:
            self.records.write(kind, step, values)
        for observer in self.observers:
            observer(kind, step, values)

    def event(self, step: int, **values: Any) -> None:
        """Write a record of something that happened."""
        self.record("event", step, values)

    def evaluated(self, step: int) -> bool:
        """Whether the evaluation after `step` updates is recorded. A collective."""
        return distributed.broadcast_object(self.records is not None and self.records.has("evaluation", step))

    @contextlib.contextmanager
    def progress(self, step: int, last_step: int) -> Iterator[None]:
        """Show a progress bar meanwhile, if rank 0 has a terminal."""
        quiet = not distributed.is_main() or not sys.stderr.isatty()
        with progress(total=last_step, initial=step, unit="step", disable=quiet) as self._bar:
            yield

    def show(self, step: int, last_step: int, text: str) -> None:
        """Show the state of training: behind the progress bar, or as a line."""
        if self._bar.disable:
            self.log(f"step {step:>{len(str(last_step))}}/{last_step}  {text}")
        else:
            self._bar.set_postfix_str(text, refresh=False)

    def advance(self) -> None:
        """Move the progress bar by one update."""
        self._bar.update()

    def flush(self) -> None:
        """Flush and fsync every record."""
        if self.records is not None:
            self.records.flush()

    def close(self) -> None:
        """Close the files."""
        if self.records is not None:
            self.records.close()
