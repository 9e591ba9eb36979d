"""Hugging Face datasets as rows, streamed or from disk. `datasets` is imported only here, and only when it is used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sas.cli import InputError

_NAME = re.compile(r"hf:(?P<dataset>[^:@]+)(:(?P<config>[^:@]+))?:(?P<split>[^:@]+)(@(?P<part>\d+)/(?P<parts>\d+))?")


def check_name(name: str) -> re.Match[str]:
    """The parts of `hf:NAME[:CONFIG]:SPLIT[@k/n]`; `InputError` when it does not read so."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(f"--input {name}: must read hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, then perhaps @PART/PARTS")
    if match["part"] is not None and not int(match["part"]) < int(match["parts"]):
        raise InputError(f"--input {name}: parts are numbered from 0 to {int(match['parts']) - 1}")
    return match


def open_dataset(name: str) -> Any:
    """The dataset `hf:NAME[:CONFIG]:SPLIT[@k/n]`: NAME on the hub or a folder of files (streamed), or a folder that
    `save_to_disk` wrote (memory-mapped). Part k of n is every n-th file where there are that many, else every n-th row.

    Raises:
        InputError: the package is missing, or the dataset cannot be opened.
    """
    match = check_name(name)
    try:
        import datasets
    except ImportError:
        raise InputError(f"--input {name}: needs the package datasets; pip install datasets") from None
    path = Path(match["dataset"])
    saved = next((folder for folder in (path / match["split"], path) if (folder / "state.json").is_file()), None)
    try:
        if saved is not None:
            # A format that was set before saving ("torch", "numpy") would come back with it.
            rows = datasets.load_from_disk(str(saved)).with_format(None)
        else:
            config = [match["config"]] if match["config"] else []
            rows = datasets.load_dataset(match["dataset"], *config, split=match["split"], streaming=True)
        if match["part"] is None:
            return rows
        part, parts = int(match["part"]), int(match["parts"])
        if saved is not None or rows.num_shards >= parts:
            return rows.shard(num_shards=parts, index=part, contiguous=False)
        return rows.filter(lambda _, index: index % parts == part, with_indices=True)
    except Exception as error:  # the library raises many kinds for wrong names, and its own text says which
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--input {name}: cannot be opened ({type(error).__name__}: {reason})") from error


def read_rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a dataset in order; what fails on the way becomes an `InputError` with the number of the row."""
    rows, number = iter(open_dataset(name)), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"{name}: fails after row {number} ({type(error).__name__}: {reason}); try again"
            ) from error
        number += 1
        yield row
