"""Cutting TensorBoard's event files back to the step that a run resumes from.

`SummaryWriter(purge_step=…)` alone leaves it to the reader to hide later points, and readers differ (TensorBoard
2.21.0): the page's default loader shows an old point until its tag is written again.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

from megatron_sas.core.files import fsync_directory, fsync_file

LENGTH = struct.Struct("<Q")  # of an event; begins its header
HEADER_BYTES = LENGTH.size + 4  # and a checksum
FOOTER_BYTES = 4  # a checksum


def cut_event_files(directory: Path, step: int) -> None:
    """Remove all points after `step` from the event files in `directory`; whenever this is interrupted, it can be
    repeated.

    What is left of a file goes into a new one, and the old one stays, empty. A page that is open already reads the new
    one from its beginning, which replaces the points that it has. Its other loader (--load_fast=false) would wait
    forever for a file that is gone. Links are not followed: what is behind them may be another run's.
    """
    if directory.is_symlink():
        return
    for path in sorted(directory.glob("*tfevents*")):
        if path.is_symlink() or not path.is_file():
            continue
        kept = _kept_ranges(path, step)
        if kept != [(0, path.stat().st_size)]:
            try:
                _move(path, kept, path.with_name(f"{path.name}.cut"))
            except OSError as error:  # of a full disk: it names no file
                raise OSError(error.errno, error.strerror, str(path)) from None


def _move(path: Path, kept: list[tuple[int, int]], target: Path) -> None:
    """Have the ranges `kept` of `path` in `target`, and nothing in `path`."""
    temporary = path.parent.with_name(f".{path.parent.name}.cut.tmp")  # not where a page would read it
    temporary.unlink(missing_ok=True)
    with open(path, "rb") as old, open(temporary, "xb") as new:
        for start, end in kept:
            old.seek(start)
            new.write(old.read(end - start))
        new.flush()
        os.fsync(new.fileno())
    os.replace(temporary, target)
    fsync_directory(target.parent)
    os.truncate(path, 0)
    fsync_file(path)


def _kept_ranges(path: Path, step: int) -> list[tuple[int, int]]:
    """Where the events lie that are no points after `step`: bytes from and to, in order.

    Checksums are not verified. TensorBoard's own reader does that in Python and takes ten times as long, a minute for
    300,000 updates.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    size, start, kept = path.stat().st_size, 0, [(0, 0)]
    with open(path, "rb") as file:
        while start + HEADER_BYTES <= size:
            (length,) = LENGTH.unpack_from(file.read(HEADER_BYTES))
            end = start + HEADER_BYTES + length + FOOTER_BYTES
            if end > size:  # a killed process leaves part of an event
                break
            try:
                event = Event.FromString(file.read(length + FOOTER_BYTES)[:length])
            except DecodeError:
                print(f"{path}: dropped {size - start} bytes from an unreadable event on", file=sys.stderr)
                break
            if event.step <= step or not event.HasField("summary"):  # others mark versions and restarts
                if kept[-1][1] == start:
                    kept[-1] = (kept[-1][0], end)
                else:
                    kept.append((start, end))
            start = end
    return kept
