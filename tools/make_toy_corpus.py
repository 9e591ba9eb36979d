#!/usr/bin/env python3
"""Write the embedded corpus: text of a small artificial language with gold trees, a vocabulary, and minimal pairs."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Container, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path

import _checkout
from megatron_sas.core.cli import InputError, progress, run_main
from megatron_sas.core.files import atomic_directory, write_json_atomic, write_text_atomic
from megatron_sas.toy.language import SENTENCES_PER_DOCUMENT, document, to_conllu, vocabulary
from megatron_sas.toy.minimal_pairs import SETS, minimal_pairs


def document_block(seed: int, split: str, number: int) -> list[tuple[str, str]]:
    """Text and CoNLL-U block of each sentence of a document; the first block opens with `# newdoc`."""
    name = f"{split}-{number}"
    blocks = [(s.text, to_conllu(s, f"{name}-{i}")) for i, s in enumerate(document(seed, split, number))]
    text, first = blocks[0]
    return [(text, f"# newdoc id = {name}\n{first}"), *blocks[1:]]


def write_train(path: Path, seed: int, sentences: int, workers: int) -> tuple[set[str], int]:
    """Write `sentences` training sentences; returns their texts and the number of words."""
    seen: set[str] = set()
    words = left = 0
    documents = -(-sentences // SENTENCES_PER_DOCUMENT)
    make = partial(document_block, seed, "train")
    with (
        path.open("w", encoding="utf-8") as file,
        multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext() as pool,
        progress(total=sentences, unit="sentence", desc=path.name) as bar,
    ):
        left = sentences
        for blocks in pool.imap(make, range(documents), chunksize=64) if pool else map(make, range(documents)):
            blocks = blocks[:left]
            seen.update(text for text, _ in blocks)
            words += sum(block.count("\n") - 3 for _, block in blocks) - 1  # one block has a line more
            file.writelines(block for _, block in blocks)
            left -= len(blocks)
            bar.update(len(blocks))
    return seen, words


def write_held_out(path: Path, seed: int, split: str, sentences: int, seen: Container[str]) -> None:
    """Write `sentences` sentences, none of which is in the training text. Whole documents are drawn until it is
    full."""
    with path.open("w", encoding="utf-8") as file:
        for i, block in zip(range(sentences), unseen_blocks(seed, split, seen), strict=False):
            if i % SENTENCES_PER_DOCUMENT == 0:
                file.write(f"# newdoc id = {split}-{i // SENTENCES_PER_DOCUMENT}\n")
            file.write(block)


def unseen_blocks(seed: int, split: str, seen: Container[str]) -> Iterator[str]:
    """CoNLL-U blocks of the sentences of `split` that are not in the training text, without `# newdoc`."""
    number = 0
    for source in count():
        for sentence in document(seed, split, source):
            if sentence.text not in seen:
                yield to_conllu(sentence, f"{split}-{number}")
                number += 1


def main() -> None:
    """Parse the arguments and write the corpus."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Writes train.conllu, validation.conllu, treebank.conllu, vocab.txt (BERT WordPiece), blimp/*.jsonl and "
        "corpus.json (seed and counts). Validation, treebank and minimal pairs contain no sentence of the training "
        "text. The same arguments give the same bytes, whatever --workers.",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to create")
    parser.add_argument("--seed", type=int, default=0, help="of the sentences; the words are fixed (default 0)")
    parser.add_argument("--train-sentences", type=int, default=250_000, metavar="N", help="default 250000, 2.0M words")
    parser.add_argument("--validation-sentences", type=int, default=2_000, metavar="N", help="default 2000")
    parser.add_argument("--treebank-sentences", type=int, default=1_000, metavar="N", help="default 1000")
    parser.add_argument("--pairs", type=int, default=400, metavar="N", help="minimal pairs per set (default 400)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that generate (default 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing DIR")
    args = parser.parse_args()
    for name in ("train_sentences", "validation_sentences", "treebank_sentences", "pairs", "workers"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: give a positive number")

    with atomic_directory(args.output, args.overwrite) as directory:
        seen, words = write_train(directory / "train.conllu", args.seed, args.train_sentences, args.workers)
        write_held_out(directory / "validation.conllu", args.seed, "validation", args.validation_sentences, seen)
        write_held_out(directory / "treebank.conllu", args.seed, "treebank", args.treebank_sentences, seen)
        write_text_atomic(directory / "vocab.txt", "\n".join(vocabulary()) + "\n")
        for uid in progress(SETS, unit="set", desc="blimp"):
            records = minimal_pairs(uid, args.pairs, args.seed, seen)
            write_text_atomic(directory / "blimp" / f"{uid}.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        counts = {
            "seed": args.seed,
            "train_sentences": args.train_sentences,
            "train_words": words,
            "validation_sentences": args.validation_sentences,
            "treebank_sentences": args.treebank_sentences,
            "vocabulary": len(vocabulary()),
            "minimal_pair_sets": len(SETS),
            "pairs_per_set": args.pairs,
        }
        write_json_atomic(directory / "corpus.json", counts)
    print(f"{args.output}: {args.train_sentences} sentences, {words} words, {len(SETS)} sets of minimal pairs")


if __name__ == "__main__":
    run_main(main)
