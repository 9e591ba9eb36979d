"""Writing packed data (docs/architecture.md, "Packed data"): all of it appears at the end, or nothing.

The files grow in a hidden folder next to the output and are renamed when they are complete, the header last. A process
that is killed leaves its folder behind; the next one that writes the same output removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sas.core.cli import InputError
from megatron_sas.core.files import check_absent, fsync_directory, fsync_file, write_json_atomic
from megatron_sas.corpus.readers.text_lines import check_file_name
from megatron_sas.data.checksums import describe_file
from megatron_sas.data.indexed_dataset import token_dtype, write_index
from megatron_sas.data.packed import FILES, FORMAT, FORMAT_VERSION, TokenizerInfo

MIN_SEQ_LENGTH, MAX_SEQ_LENGTH = 8, 1 << 15
MAX_RELATIONS = 255
_STREAMS = {"heads.bin": "<i2", "marks.bin": "u1", "relns.bin": "u1"}
_OWNER = "owner"  # in the hidden folder: the host's name, locked while its process lives
_ABANDONED_AFTER = 24 * 3600  # seconds without a write, for folders of other hosts, whose locks cannot be trusted


class PackedWriter:
    """A context manager that writes PREFIX.bin, .idx, .heads.bin, .marks.bin, .relns.bin and, by `finish`, PREFIX.json.

    Without a call of `finish` nothing appears under the prefix. `overwrite` replaces what is there.

    Raises:
        InputError: a file of that prefix exists and `overwrite` is false; a name is not UTF-8.
    """

    def __init__(self, prefix: str | Path, seq_length: int, tokenizer: TokenizerInfo, overwrite: bool = False) -> None:
        self.prefix, self.seq_length, self.tokenizer = Path(prefix), seq_length, tokenizer
        check_file_name(prefix)
        check_file_name(tokenizer.path)
        for name in (*FILES, "json"):
            check_absent(f"{self.prefix}.{name}", overwrite)  # not `prefix`, which may end in "/"
        self.num_sequences = 0
        self._dtypes = {"bin": token_dtype(tokenizer.vocab_size), **_STREAMS}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> PackedWriter:
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._folder = stack.enter_context(temporary_folder(self.prefix))
            self._files = [stack.enter_context(open(self._folder / f"data.{name}", "wb")) for name in self._dtypes]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, tokens: np.ndarray, heads: np.ndarray, boundaries: np.ndarray, relations: np.ndarray) -> None:
        """Append one sequence, each stream (S,), or several, each (n, S); any integer dtypes whose values fit."""
        self.num_sequences += tokens.size // self.seq_length
        streams = (tokens, heads, boundaries, relations)
        for file, dtype, stream in zip(self._files, self._dtypes.values(), streams, strict=True):
            file.write(np.ascontiguousarray(stream, dtype=dtype))

    def finish(self, relations: list[str], **fields: Any) -> dict[str, Any]:
        """Publish the data and return its header; `fields` join what every header has."""
        for file in self._files:
            file.close()
            fsync_file(file.name)
        lengths = np.full(self.num_sequences, self.seq_length, np.int32)
        write_index(self._folder / "data.idx", self._dtypes["bin"], lengths)
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "seq_length": self.seq_length,
            "num_sequences": self.num_sequences,
            "tokenizer": asdict(self.tokenizer),
            **fields,
            "relations": relations,
            "files": {name: describe_file(self._folder / f"data.{name}") for name in FILES},
        }
        write_json_atomic(self._folder / "data.json", header)
        publish({self._folder / f"data.{name}": Path(f"{self.prefix}.{name}") for name in (*FILES, "json")})
        return header


def publish(files: dict[Path, Path]) -> None:
    """Give finished files their names, the header, which comes last, after all others are on the disk."""
    *data, header = files.items()
    header[1].unlink(missing_ok=True)  # an old one never stands beside new data
    for stage in ([], data, [header]):
        for path, name in stage:
            os.replace(path, name)
        fsync_directory(header[1].parent)


def check_seq_length(seq_length: int) -> None:
    """Refuse sequences that the format cannot hold (`InputError`)."""
    if not MIN_SEQ_LENGTH <= seq_length <= MAX_SEQ_LENGTH:
        raise InputError(f"--seq-length {seq_length}: must be {MIN_SEQ_LENGTH} to {MAX_SEQ_LENGTH}")


@contextlib.contextmanager
def temporary_folder(prefix: Path) -> Iterator[Path]:
    """A folder next to the output (so that renaming out of it is atomic), removed in every case but a kill."""
    remove_leftovers(prefix)
    folder = Path(tempfile.mkdtemp(dir=prefix.parent, prefix=f".{prefix.name}.", suffix=".tmp"))
    try:
        with open(folder / f"{_OWNER}.new", "w", encoding="utf-8") as owner:
            with contextlib.suppress(OSError):  # a file system without locks: then its age decides
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner.write(socket.gethostname())
            owner.flush()
            os.replace(owner.name, folder / _OWNER)  # only now, locked, can others see it
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(prefix: Path) -> list[Path]:
    """Remove hidden folders of killed processes that wrote the same output; returns them.

    A folder goes when its owner ran on this host and no longer holds its lock, or when nobody has written to it for a
    day.
    """
    pattern = re.compile(re.escape(f".{prefix.name}.") + r"[a-z0-9_]{8}\.tmp")
    leftovers = [path for path in prefix.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir()]
    removed = [path for path in leftovers if _is_abandoned(path)]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed


def _is_abandoned(folder: Path) -> bool:
    try:
        with open(folder / _OWNER, encoding="utf-8") as owner:
            if owner.read() == socket.gethostname():
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
    except BlockingIOError:
        return False
    except OSError:
        pass
    try:
        newest = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    except OSError:  # its owner has just removed it
        return False
    return time.time() - newest > _ABANDONED_AFTER
