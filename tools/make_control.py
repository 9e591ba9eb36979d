#!/usr/bin/env python3
"""Make heads that are not syntax for packed data: a control for the SAS regularizer."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import _checkout
from megatron_sas.core.cli import InputError, progress, run_main
from megatron_sas.core.files import check_absent, fsync_file, write_json_atomic
from megatron_sas.corpus.build.packed_writer import publish, temporary_folder
from megatron_sas.corpus.controls import Control, parse_control
from megatron_sas.data.checksums import block_checksums
from megatron_sas.data.packed import PackedData

BLOCK_TOKENS = 1 << 19  # tokens held in memory at a time


def write_heads(
    packed: PackedData, control: Control, seed: int, path: Path, block_tokens: int = BLOCK_TOKENS
) -> dict[str, int | str]:
    """Write the control's (N, S) int16 heads to `path`, block by block; returns SHA-256 and counts of edges."""
    digest = hashlib.sha256()
    total = packed.num_sequences
    rows = max(1, block_tokens // packed.seq_length)
    counts = {"edges": 0, "base_edges": 0, "equal_edges": 0}
    with path.open("wb") as file, progress(total=total, unit="sequence", desc=path.name) as bar:
        for start in range(0, total, rows):
            stop = min(start + rows, total)
            base = np.asarray(packed.heads[start:stop])
            try:
                heads = control(base, np.asarray(packed.boundaries[start:stop]), seed, np.arange(start, stop))
            except ValueError as error:
                raise InputError(
                    f"{packed.prefix}.heads.bin: in the block from sequence {start}: {error}; preprocess the text again"
                ) from error
            content = heads.astype("<i2").tobytes()
            file.write(content)
            digest.update(content)
            counts["edges"] += int(np.count_nonzero(heads >= 0))
            counts["base_edges"] += int(np.count_nonzero(base >= 0))
            counts["equal_edges"] += int(np.count_nonzero((heads == base) & (base >= 0)))
            bar.update(stop - start)
    return {"sha256": digest.hexdigest(), **counts}


def make_control(
    data: str,
    kind: str,
    seed: int,
    name: str | None = None,
    overwrite: bool = False,
    *,
    write_header: Callable[[Path, dict[str, Any]], None] = write_json_atomic,
) -> None:
    """Write the stream and, last, its header."""
    control = parse_control(kind)
    name = name or kind.replace(":", "-").replace("+", "")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError(f"--name {name!r}: use letters, digits, - and _ only")
    stream, header = Path(f"{data}.heads-{name}.bin"), Path(f"{data}.heads-{name}.json")
    check_absent(stream, overwrite)
    check_absent(header, overwrite)
    packed = PackedData(data)
    with temporary_folder(stream) as folder:
        temporary = folder / stream.name
        result = write_heads(packed, control, seed, temporary) | block_checksums(temporary)
        os.chmod(temporary, os.stat(f"{data}.heads.bin").st_mode & 0o777)
        fsync_file(temporary)
        base = {name: packed.header["files"][name].get("sha256") for name in ("heads.bin", "marks.bin")}
        origin = {"kind": kind, "seed": seed, "base_fingerprint": packed.fingerprint, "base_files": base}
        write_header(folder / header.name, {"name": name, **origin, **result})
        publish({temporary: stream, folder / header.name: header})
    print(
        f"{stream}: {result['edges']} edges for {result['base_edges']} of the parse, "
        f"{result['equal_edges']} of them the same"
    )


def main() -> None:
    """Parse the arguments and make the control."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Writes PREFIX.heads-NAME.bin and PREFIX.heads-NAME.json; training uses "
        "them when told NAME as the source of heads.",
    )
    parser.add_argument("--data", required=True, metavar="PREFIX", help="--output of tools/preprocess_data.py")
    parser.add_argument(
        "--control",
        required=True,
        metavar="KIND",
        help="permuted: each sentence's tree over randomly permuted words; offset:K: every dependent points K words "
        "on, or back where that leaves the sentence; random_tree: random trees with the sentence's own edge lengths",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random controls (default 0)")
    parser.add_argument("--name", help="NAME in the file names (default: KIND, with - for :)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing stream of this name")
    args = parser.parse_args()
    make_control(args.data, args.control, args.seed, args.name, args.overwrite)


if __name__ == "__main__":
    run_main(main)
