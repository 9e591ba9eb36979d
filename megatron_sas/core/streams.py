"""Standard output and error that outlive whoever reads them.

A pipe is closed (`program | head`), a terminal vanishes with its ssh session, the disk under a log is full. Printing
would then raise in the middle of whatever the program does. Here the text is dropped instead, in one place, for every
`print`, progress bar, log handler and traceback of the process.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys

NOBODY_READS = (errno.EPIPE, errno.EIO)  # a closed pipe, a vanished terminal


class _Descriptor(io.RawIOBase):
    """A file descriptor to write to. What it does not take is dropped; the next text is tried again."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor, self.name = descriptor, name
        self.fault: OSError | None = None  # the last one

    def write(self, content: bytes) -> int:
        """Write `content`, and return its length whether that worked or not."""
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[os.write(self.descriptor, rest) :]
        except OSError as error:
            self.fault = error
        return len(content)

    def writable(self) -> bool:
        """Whether text can be written: always."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self.descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self.descriptor)


def keep_printing() -> None:
    """Replace `sys.stdout` and `sys.stderr` by streams whose writes never fail. To be called before anything else.

    Descriptors 0 to 2 that were closed when the process started (`>&-`) are opened on the null device: otherwise the
    next files to be opened would take their numbers, and what libraries print would go into these files. A stream that
    something else has put in the place of Python's own stays.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # Python found it closed; by now its number may be another file's
            kept = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            kept = _kept(stream)
        else:
            continue
        setattr(sys, name, kept)
        setattr(sys, f"__{name}__", kept)


def _kept(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream, but for faults of its descriptor."""
    with contextlib.suppress(OSError):
        stream.flush()
    raw = _Descriptor(stream.fileno(), stream.name)
    buffer = raw if stream.write_through else io.BufferedWriter(raw)  # as with `python -u` and without
    options = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, **options)


def fault_of_output() -> OSError | None:
    """What kept text from standard output since `keep_printing`; None also where nobody would have read it."""
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    fault = raw.fault if isinstance(raw, _Descriptor) else None
    return None if fault is None or fault.errno in NOBODY_READS else fault
