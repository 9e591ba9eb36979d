#!/usr/bin/env python3
"""Train a tokenizer on text: WordPiece as BERT's, or unigram or BPE with SentencePiece.

    python tools/train_tokenizer.py --input wiki-*.jsonl.xz --type wordpiece --vocab-size 30522 --output tokenizer

Writes a Hugging Face tokenizer with [PAD] [UNK] [CLS] [SEP] [MASK] as ids 0 to 4, for --tokenizer of
tools/preprocess_data.py and for transformers 4 and 5. The same input gives the same files, with any number of cores;
other versions of the libraries, and for unigram another kind of processor, may give others (docs/decisions.md).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import _checkout
from megatron_sas.core.cli import InputError, progress, run_main
from megatron_sas.core.files import atomic_directory, check_absent
from megatron_sas.corpus.build.skipped import SkipReport
from megatron_sas.corpus.readers.base import Reading
from megatron_sas.corpus.readers.registry import read_units
from megatron_sas.corpus.readers.text_lines import OnError
from megatron_sas.corpus.train_tokenizer import KINDS, train_tokenizer
from megatron_sas.data.masking import bernoulli, hash_u64
from megatron_sas.data.tokenizer import save_tokenizer, vocab_size


class Paragraphs:
    """The paragraphs of the inputs, each with probability `share` by a hash of its number.

    `used` counts what the last pass has yielded; `skipped` says what broken input it met.
    """

    def __init__(self, inputs: list[str], text_field: str, on_error: OnError, share: float) -> None:
        self.inputs, self.text_field, self.on_error, self.share = inputs, text_field, on_error, share
        self.used, self.skipped = 0, SkipReport()

    def __iter__(self) -> Iterator[str]:
        self.used, self.skipped = 0, SkipReport()
        reading = Reading(self.text_field, self.on_error, self.skipped)
        with progress(unit=" paragraphs", unit_scale=True, desc="reading") as bar:
            for number, unit in enumerate(read_units(self.inputs, reading)):
                content = unit.content
                if content is None or not bernoulli(hash_u64(number), self.share)[0]:
                    continue
                self.used += 1
                bar.update()
                yield content if isinstance(content, str) else content.text


def main() -> None:
    """Train, save, and say what came out."""
    arguments = parse_arguments()
    if not 0 < arguments.share <= 1:
        raise InputError(f"--share {arguments.share}: must be above 0 and at most 1")
    check_absent(arguments.output, arguments.overwrite)
    paragraphs = Paragraphs(arguments.input, arguments.text_field, arguments.on_error, arguments.share)
    start = time.perf_counter()
    tokenizer = train_tokenizer(paragraphs, arguments.type, arguments.vocab_size, arguments.cased)
    with atomic_directory(arguments.output, arguments.overwrite) as directory:
        save_tokenizer(tokenizer, directory, None)
    size = vocab_size(tokenizer)
    print(
        f"{arguments.output}: {arguments.type} with {size:,} entries from {paragraphs.used:,} paragraphs "
        f"in {time.perf_counter() - start:.1f} s"
    )
    if size < arguments.vocab_size:
        print(f"note: fewer than the {arguments.vocab_size:,} asked for; the text has no more parts that occur twice")
    for reason, entry in paragraphs.skipped.report().items():
        print(f"skipped: {reason}: {entry['count']:,}, the first at {entry['examples'][0]['where']}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="text as for tools/preprocess_data.py (also hf:NAME)"
    )
    parser.add_argument("--type", choices=KINDS, required=True, help="unigram and bpe: with SentencePiece")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="entries, special tokens included")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the tokenizer directory to make")
    parser.add_argument(
        "--cased",
        action="store_true",
        help="keep capitals (default: lower-case; WordPiece then also strips accents, as BERT uncased does)",
    )
    parser.add_argument(
        "--share", type=float, default=1.0, metavar="P", help="use this share of the paragraphs, chosen by hash (1.0)"
    )
    parser.add_argument("--text-field", default="text", help="field of JSON objects and datasets that holds the text")
    parser.add_argument(
        "--on-error",
        choices=("refuse", "skip"),
        default="refuse",
        help="broken input: stop (default), or leave out and count",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
