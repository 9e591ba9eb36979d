"""Packed shards → one packed data set.

    python tools/merge_data.py --inputs data/shards/*.json --output data/train

Takes the prefixes that tools/preprocess_data.py wrote, or their headers (PREFIX.json), of one tokenizer and sequence
length. Headers of controls (PREFIX.heads-NAME.json) are passed over: make the controls anew for the result. Every file
is compared with its checksum before it is used. Parts that hold the same text, as far as their headers tell, and sides
of different splits are refused. Training can also take the shards as they are: `data.train` may be a list of prefixes.
"""

from __future__ import annotations

import argparse
import re

import _checkout
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.corpus.build.merge import merge


def main() -> None:
    """Merge and print what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", nargs="+", required=True, metavar="PREFIX", help="packed data, in this order")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="prefix of the files to write")
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    given = parser.parse_args()
    controls = [name for name in given.inputs if re.search(r"\.heads-[A-Za-z0-9_-]+\.json$", name)]
    prefixes = [name.removesuffix(".json") for name in given.inputs if name not in controls]
    if not prefixes:
        raise InputError(f"--inputs: {controls[0]} is the header of a control; give that of its packed data")
    header = merge(prefixes, given.output, given.overwrite)
    for name, value in header["counts"].items():
        print(f"{name.replace('_', ' '):>28} {value:>14,}")
    shape = f"{header['num_sequences']:,} sequences of {header['seq_length']}"
    print(f"{given.output}: {shape} from {len(header['parts'])} parts")
    if controls:
        print(f"passed over {controls[0]} and the like ({len(controls)}): make controls of the merged data")


if __name__ == "__main__":
    run_main(main)
