"""Hugging Face datasets as rows, and what tells their versions apart. `datasets` is imported here only, when used."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_sas.core.cli import InputError, kind_and_reason
from megatron_sas.core.files import sha256_file_once
from megatron_sas.corpus.readers.base import Reader, Reading, Unit, record_units

_NAME = re.compile(
    r"hf:(?P<dataset>[^:@]+)(@(?P<revision>[^:@]+))?(:(?P<config>[^:@]+))?:(?P<split>[^:@]+)"
    r"(@(?P<part>\d+)/(?P<parts>\d+))?"
)


def check_name(name: str) -> re.Match[str]:
    """The parts of `hf:NAME[@REVISION][:CONFIG]:SPLIT[@k/n]`; `InputError` when it does not read so."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(
            f"--input {name}: must read hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, perhaps with @REVISION after NAME and "
            "@PART/PARTS at the end"
        )
    if match["part"] is not None and not int(match["part"]) < int(match["parts"]):
        raise InputError(f"--input {name}: parts are numbered from 0 to {int(match['parts']) - 1}")
    return match


def open_dataset(name: str, block: int = 1) -> Any:
    """The dataset `hf:NAME[@REVISION][:CONFIG]:SPLIT[@k/n]`: NAME on the hub or a folder of files (streamed), or a
    folder that `save_to_disk` wrote (memory-mapped). Part k of n is every n-th file where there are that many, else
    every n-th row group of Parquet files, else (noted on stderr) every n-th row; of a saved dataset every n-th row.
    Where `block` rows belong together (more than one), it is the k-th range of these or every n-th block of rows.

    Raises:
        InputError: the package is missing, or the dataset cannot be opened.
    """
    with _opened(name) as (match, source, saved):
        rows = source if saved else _stream(source, match["split"])
        if match["part"] is None:
            return rows
        part, parts = int(match["part"]), int(match["parts"])
        if not saved and rows.num_shards < parts:
            files, rows = rows, rows.reshard()
            if rows.num_shards < parts:
                print(
                    f"{name}: has fewer files and row groups than parts: all rows are read to keep a part of them",
                    file=sys.stderr,
                )
                return files.filter(lambda _, index: index // block % parts == part, with_indices=True)
        return rows.shard(num_shards=parts, index=part, contiguous=block > 1)


def dataset_version(name: str) -> dict[str, Any]:
    """What tells a dataset from other versions of it: on the hub its commit, `revision`; in a folder the `size` (bytes)
    and `sha256` (of the SHA-256 of each) of the split's files, in the order of reading. All three where the hub cannot
    be reached and `datasets` has it in its cache: it has other files there, and so other parts.

    Raises:
        InputError: as `open_dataset`.
    """
    with _opened(name) as (match, source, saved):
        if saved:
            return _content(entry["filename"] for entry in source.cache_files)
        _stream(source, match["split"])  # a wrong split is reported before anything is read
        if Path(match["dataset"]).is_dir():
            files = {str(split): paths for split, paths in source.config.data_files.items()}
            splits = files if match["split"] == "all" else match["split"].split("+")
            return _content(path for split in splits for path in files[split.strip()])
        version = {"revision": source.hash}
        if _is_cached(source):
            version |= _content(map(str, sorted(Path(source.cache_dir).glob("*.arrow"))))
        return version


def read_rows(name: str, block: int = 1) -> Iterator[dict[str, Any]]:
    """The rows of a dataset in order; what fails on the way becomes an `InputError` with the number of the row.

    `block`: see `open_dataset`.
    """
    rows, number = open_dataset(name, block), 0
    try:
        for row in rows:
            number += 1
            yield row
    except Exception as error:
        remedy = "correct it" if isinstance(error, ValueError) else "try again"  # content, or the network
        raise InputError(f"{name}: fails after row {number} ({kind_and_reason(error)}); {remedy}") from error


@contextlib.contextmanager
def _opened(name: str) -> Iterator[tuple[re.Match[str], Any, bool]]:
    """The parts of a name and its `_source`; what fails becomes an `InputError`."""
    match = check_name(name)
    try:
        yield match, *_source(name, match)
    except InputError:
        raise
    except Exception as error:  # the library raises many kinds for wrong names; its own text explains
        remedy = "; without a network give a folder of its files" if isinstance(error, ConnectionError) else ""
        raise InputError(f"--input {name}: cannot be opened ({kind_and_reason(error)}){remedy}") from error


def _source(name: str, match: re.Match[str]) -> tuple[Any, bool]:
    """A saved dataset and True, or the builder that streams one and False."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"--input {name}: needs the package datasets; pip install datasets") from None
    path, config, split, revision = Path(match["dataset"]), match["config"], match["split"], match["revision"]
    if revision is not None and path.is_dir():
        raise InputError(f"--input {name}: {path} is a folder and has no revisions; leave out @{revision}")
    saved = next((folder for folder in (path / split, path) if (folder / "state.json").is_file()), None)
    if saved is not None:
        # A format that was set before saving ("torch", "numpy") would come back with it.
        rows = datasets.load_from_disk(str(saved), keep_in_memory=False).with_format(None)
        known = str(rows.split or split).partition("[")[0]  # "train[:10%]" was a share of train
        if saved == path and known != split:
            raise InputError(f"--input {name}: what was saved in {path} is the split {known}, not {split}")
        return rows, True
    if path.is_dir():
        return datasets.load_dataset_builder(match["dataset"], config), False
    builder = _hub_builder(match["dataset"], config, revision)
    if revision is not None and _is_cached(builder) and builder.hash != revision:
        raise InputError(
            f"--input {name}: the hub cannot be reached, and the cache of datasets has revision {builder.hash}; name "
            "that one or give a folder of its files"
        )
    return builder, False


def _stream(builder: Any, split: str) -> Any:
    """The rows of a split, without a download as a whole.

    JSON lines are parsed here, each by itself. `datasets` would give all of them the types of the first 10 MiB, and
    fail where a field that was empty so far gets its first number, or an id its first letter.
    """
    from datasets.packaged_modules.json.json import Json

    if isinstance(builder, Json) and builder.config.field is None:
        lines = _lines(builder).as_streaming_dataset(split=split).filter(lambda row: not row["text"].isspace())
        first = next(iter(lines), None)
        with contextlib.suppress(ValueError):  # the line of an array, or of an object on several lines
            if first is not None:
                _parse_line(first)
                return lines.map(_parse_line, remove_columns=["text"])
    return builder.as_streaming_dataset(split=split)


def _lines(builder: Any) -> Any:
    """A builder for the lines of another one's files."""
    from datasets.packaged_modules.text.text import Text
    from datasets.streaming import extend_dataset_builder_for_streaming

    config = builder.config
    lines = Text(
        dataset_name=builder.dataset_name,
        base_path=builder.base_path,
        token=builder.token,
        storage_options=builder.storage_options,
        data_files=config.data_files,
        encoding="utf-8-sig" if config.encoding == "utf-8" else config.encoding,
        encoding_errors=config.encoding_errors,
        keep_linebreaks=True,
    )
    extend_dataset_builder_for_streaming(lines)
    return lines


def _parse_line(row: dict[str, str]) -> dict[str, Any]:
    try:
        record = json.loads(row["text"])
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(record, dict):
        raise ValueError("a line is not a JSON object")
    return record


@functools.cache
def _hub_builder(dataset: str, config: str | None, revision: str | None) -> Any:
    """One commit of a dataset for as long as this process runs, whatever is uploaded meanwhile."""
    import datasets

    return datasets.load_dataset_builder(dataset, config, revision=revision)


def _is_cached(builder: Any) -> bool:
    """Whether it reads what `datasets` once downloaded and converted, which it does when it does not reach the hub."""
    from datasets.packaged_modules.cache.cache import Cache

    return isinstance(builder, Cache)


def _content(paths: Iterable[str]) -> dict[str, Any]:
    """Total size and SHA-256 of files in this order, whatever their names."""
    size, digest = 0, hashlib.sha256()
    for path in paths:  # read once a process, which may do many parts: all of the files tell their version
        size += os.stat(path).st_size
        digest.update(sha256_file_once(path).encode())
    return {"size": size, "sha256": digest.hexdigest()}


def _units(name: str, reading: Reading) -> Iterator[Unit]:
    """One document a row of a Hugging Face dataset."""
    for number, row in enumerate(read_rows(name, reading.rows_per_document or 1), 1):
        yield from record_units(row, f"{name}:{number}", reading)


class HubReader(Reader):
    """Reads `hf:NAME[@REVISION][:CONFIG]:SPLIT[@k/n]`."""

    def check(self, name: str) -> None:
        """Raise `InputError` for a name that does not read so."""
        check_name(name)

    def label(self, name: str) -> str:
        """The name in full."""
        return name

    place = label

    def version(self, name: str) -> dict[str, Any]:
        """See `dataset_version`."""
        return dataset_version(name)

    def output_name(self, name: str) -> str:
        """The name with "-" for what file names do not have."""
        return re.sub(r"[^\w.]+", "-", name.partition(":")[2]).strip("-")

    def dataset(self, label: str) -> str | None:
        """The name without the part; None for one without."""
        part = re.fullmatch(r"(.+)@\d+/\d+", label)
        return part and part[1]


HUB = HubReader(_units, "NAME[@REVISION][:CONFIG]:SPLIT[@k/n], a Hugging Face dataset, streamed (part k of n of it)")
