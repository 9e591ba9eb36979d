"""A tokenised Hugging Face dataset with dependency heads (the paper's published form) → packed training data.

    python tools/import_dataset.py --input hf:NAME:train --tokenizer vocab.txt --output data/imported
    python tools/import_dataset.py --input hf:saved_to_disk_folder:train --tokenizer DIR --output data/imported

The dataset needs the columns input_ids, heads and relns, -1 for none. The tokenizer must be the one that made the ids:
nothing in such a dataset says which it was, so the decoded beginning of the first sequence is printed to look at.
"""

from __future__ import annotations

import argparse

import _checkout
from megatron_sas.core.cli import run_main
from megatron_sas.corpus.import_dataset import COUNTS, import_dataset
from megatron_sas.data.packed import PackedData
from megatron_sas.data.tokenizer import load_tokenizer
from megatron_sas.data.unknown import Unknown


def main() -> None:
    """Import and report what could be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        required=True,
        metavar="hf:NAME[@REVISION][:CONFIG]:SPLIT",
        help="a dataset of the hub, a folder of its files, or one that save_to_disk wrote",
    )
    parser.add_argument("--tokenizer", required=True, metavar="VOCAB_OR_DIR", help="the tokenizer that made input_ids")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="prefix of the files to write")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens a sequence with [CLS] and [SEP] (512)")
    parser.add_argument(
        "--relations", metavar="FILE", help="names of the relations, that of number 0 first (relation-0, …)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    given = parser.parse_args()
    counts = import_dataset(
        given.input, given.tokenizer, given.output, given.seq_length, given.relations, given.overwrite
    )["counts"]
    for name, meaning in COUNTS.items():
        print(f"{counts[name]:>14,}  {meaning}")
    print(Unknown(counts["pieces"], counts["pieces_unknown"]).line("the dataset"))
    beginning = PackedData(given.output).tokens[0, :40].tolist()
    print(f"{given.output}: begins with {load_tokenizer(given.tokenizer).decode(beginning)!r}")


if __name__ == "__main__":
    run_main(main)
