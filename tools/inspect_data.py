#!/usr/bin/env python3
"""Look at packed data: sequences with pieces, edges and relations, and statistics of the whole."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import _checkout
from megatron_sas.core.cli import InputError, progress, run_main
from megatron_sas.core.files import check_absent, write_json_atomic, write_text_atomic
from megatron_sas.corpus.inspect.drawing import as_html, as_text, segments
from megatron_sas.corpus.inspect.statistics import MIN_WORDS_OF_DUPLICATES, statistics
from megatron_sas.data.packed import PackedData
from megatron_sas.data.sampler import permute
from megatron_sas.data.tokenizer import load_tokenizer, tokenizer_identity

EPILOG = """\
Coverage is the share of words with an edge (a root has none, nor a word whose head lies beyond the sequence's end).
Unparsed are words in sentences of two or more words without any edge. A duplicate repeats the tokens of an earlier
sequence, or of an earlier sentence of at least five words."""


def main() -> None:
    """Compute, print and write."""
    arguments = parse_arguments()
    for path in (arguments.html, arguments.output):
        if path is not None:
            check_absent(path, arguments.overwrite)
    packed = PackedData(arguments.data, arguments.heads)
    if arguments.verify:
        packed.verify()
        print(f"{arguments.data}: all checksums match")
    numbers = chosen_sequences(arguments, packed.num_sequences)
    path = arguments.tokenizer or packed.tokenizer.path
    tokenizer = load_tokenizer(path)
    if not tokenizer_identity(tokenizer).matches(packed.tokenizer.identity):
        raise InputError(f"{path}: is not the tokenizer that made {arguments.data}; give that one with --tokenizer")
    drawn = {number: segments(packed, number, tokenizer) for number in numbers}
    with progress(total=packed.num_sequences, unit="sequence", desc="statistics") as bar:
        result = statistics(packed, bar.update)
    tables = as_tables(result, packed)
    if arguments.html is None:
        for number, content in drawn.items():
            print(f"sequence {number}\n" + "\n\n".join(as_text(segment) for segment in content) + "\n")
    for caption, rows in tables.items():
        print(caption)
        print("\n".join(f"  {name:<34} {value:>16}" for name, value in rows.items()))
    title = f"{Path(arguments.data).name}{f', heads {arguments.heads}' if arguments.heads else ''}"
    if arguments.html is not None:
        write_text_atomic(arguments.html, as_html(title, tables, drawn))
        print(f"wrote {arguments.html}")
    if arguments.output is not None:
        write_json_atomic(arguments.output, {"data": str(arguments.data), "heads": arguments.heads, **result})
        print(f"wrote {arguments.output}")


def chosen_sequences(arguments: argparse.Namespace, total: int) -> list[int]:
    """The sequences asked for by number, or `--sample` of them, spread by a fixed permutation."""
    if arguments.sequences is None:
        return sorted(permute(np.arange(min(arguments.sample, total)), total, seed=0, epoch=0).tolist())
    for number in arguments.sequences:
        if not 0 <= number < total:
            raise InputError(f"--sequences {number}: {arguments.data} has sequences 0 to {total - 1}")
    return arguments.sequences


def as_tables(result: dict[str, Any], packed: PackedData) -> dict[str, dict[str, str]]:
    """The statistics in words, by caption."""

    def of(count: int, total: int) -> str:
        return f"{count:,} ({count / max(1, total):.2%})"

    lengths, edges = result["edge_length"], result["edges"]
    content = {
        "sequences": f"{result['sequences']:,} of {packed.seq_length}",
        "words": f"{result['words']:,}",
        "sentences": f"{result['sentences']:,}",
        "pieces per word": f"{result['pieces_per_word']:.3f}",
        "unknown pieces": of(result["unknown"], result["tokens"]),
        "words with an edge (coverage)": of(edges, result["words"]),
        "unparsed words": of(result["unparsed_words"], result["words"]),
        "sequences without edges": of(result["sequences_without_edges"], result["sequences"]),
        "repeated sequences": of(result["duplicate_sequences"], result["sequences"]),
        f"repeated sentences of {MIN_WORDS_OF_DUPLICATES}+ words": of(
            result["duplicate_sentences"], result["compared_sentences"]
        ),
    }
    shape = {"head before dependent": f"{result['edges_to_the_left']:.2%}", "mean": f"{lengths['mean']:.2f}"}
    shape |= {"median": str(lengths["median"])}
    shape |= {name: of(count, edges) for name, count in lengths["counts"].items()}
    relations = {name: of(count, edges) for name, count in result["relations"].items()}
    return {"Content": content, "Edge lengths in words": shape, "Relations of edges": relations}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="PREFIX", help="--output of tools/preprocess_data.py")
    parser.add_argument("--heads", metavar="NAME", help="instead of the data's heads those of tools/make_control.py")
    parser.add_argument("--tokenizer", metavar="VOCAB_OR_DIR", help="if it is no longer where the data's header says")
    parser.add_argument("--sample", type=int, default=2, metavar="N", help="show N sequences from anywhere (2)")
    parser.add_argument("--sequences", type=int, nargs="+", metavar="I", help="show these instead, counted from 0")
    parser.add_argument("--html", type=Path, metavar="FILE", help="draw them in this page rather than on the terminal")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the statistics")
    parser.add_argument("--verify", action="store_true", help="first read everything and compare all checksums")
    parser.add_argument("--overwrite", action="store_true", help="replace --html and --output if they exist")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
