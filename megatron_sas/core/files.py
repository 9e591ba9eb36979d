"""Writing files so that each is either whole or absent, and hashing them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_sas.core.cli import InputError

_UMASK_LOCK = threading.Lock()


def fsync_directory(path: str | Path) -> None:
    """Make renames inside `path` durable (needed after `os.replace` for a crash of the machine, not of the process)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: str | Path) -> None:
    """Flush the contents of `path` to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` next to `path`, flush it to the disk, and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)


def write_text_atomic(path: str | Path, text: str) -> None:
    """`write_bytes_atomic` for UTF-8 text."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | Path, value: Any) -> None:
    """`write_bytes_atomic` for a JSON value, indented, keys in the order given; numbers that JSON lacks become null."""
    write_text_atomic(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with None for numbers that are not finite, which JSON lacks."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_absent(path: str | Path, overwrite: bool = False) -> None:
    """Raise `InputError` when `path` exists and `overwrite` is false: outputs are never silently replaced."""
    if not overwrite and os.path.lexists(Path(path)):  # without a "/" at its end, as it will be written
        raise InputError(f"{path}: exists already; choose another output or pass --overwrite")


@contextlib.contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the block ends, and vanishes when it raises."""
    path = Path(path)
    check_absent(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            (fsync_directory if entry.is_dir() else fsync_file)(entry)
        os.chmod(temporary, 0o777 & ~_umask())
        check_absent(path, overwrite)  # it may have come into being meanwhile
        if os.path.lexists(path):
            stale = path.with_name(f".{path.name}.old")
            remove(stale)
            os.replace(path, stale)
            os.replace(temporary, path)
            remove(stale)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_directory(path.parent)


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(folder: str | Path, names: Iterable[str]) -> str:
    """Hexadecimal SHA-256 of the files and folders `names` in `folder`, those that are there: of every file's path from
    `folder` and its bytes, in alphabetical order, so that it is the same wherever `folder` lies. Read once a process.
    """
    paths = (path for name in names for path in (Path(folder, name), *Path(folder, name).rglob("*")) if path.is_file())
    files = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
    lines = (f"{sha256_file_once(path)} {name}\n" for name, path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256_file_once(path: str | Path) -> str:
    """`sha256_file`, but a process reads a file once as long as it keeps its size and time of change."""
    status = os.stat(path)
    return _sha256_of_state(str(path), status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256_of_state(path: str, size: int, mtime_ns: int) -> str:
    return sha256_file(path)


def obey_umask(path: str | Path) -> None:
    """Give a file that a library created for its owner alone the permissions of any new file."""
    os.chmod(path, 0o666 & ~_umask())


def remove(path: Path) -> None:
    """Remove a file, a symbolic link (not what it points at) or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask (temporary files are created 0600; outputs should obey the user's umask)."""
    with _UMASK_LOCK:  # it can only be read by changing it, and checkpoints are written by a thread
        mask = os.umask(0o077)
        os.umask(mask)
    return mask
