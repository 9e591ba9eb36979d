"""What every command-line program of the project shares: one-line errors and quiet progress bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm import tqdm

from megatron_sas.core.streams import fault_of_output, keep_printing


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: file, line or field; what is wrong; what to do."""


class CommonError(InputError):
    """An `InputError` raised identically on every rank, so only rank 0 prints it."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and exit: 0 on success, 2 with one line on stderr for wrong input or an unusable file.

    Where nobody reads what it prints (`tool | head`) it goes on, since it may have files to write.
    """
    keep_printing()
    try:
        code = main() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing half-written was left behind", file=sys.stderr)
        code = 130
    if fault := fault_of_output():
        print(f"error: standard output: {fault.strerror}; not all of it was written", file=sys.stderr)
        code = code or 2
    sys.exit(code)


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind if it says nothing; torch and others go on to explain."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def kind_and_reason(error: Exception) -> str:
    """The kind of an error of a library and the first line of what it says."""
    kind, reason = type(error).__name__, first_line(error)
    return kind if reason == kind else f"{kind}: {reason}"


def listed(names: Sequence[str]) -> str:
    """The first six names, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """`tqdm` on stderr, silent when stderr is not a terminal. Options are tqdm's (`total`, `unit`, `desc`, …)."""
    options.setdefault("disable", not sys.stderr.isatty())
    options.setdefault("dynamic_ncols", True)
    return tqdm(iterable, **options)
