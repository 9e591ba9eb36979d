#!/usr/bin/env python3
"""How good silver parses are: a parser scored on a treebank through the pipeline that prepares training data."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import _checkout
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.core.files import sha256_file, write_json_atomic
from megatron_sas.corpus.parsers.products import CHOICES, OPS_HELP, SPACY
from megatron_sas.corpus.parsers.registry import check_predicts, describe_parser, make_parser, predictor_usage
from megatron_sas.corpus.readers.base import Reading
from megatron_sas.corpus.readers.registry import find_reader, read_units
from megatron_sas.corpus.readers.trees import blanked_note
from megatron_sas.evaluation.command_line import check_output
from megatron_sas.evaluation.parser_quality import differing_heads, evaluate_parser, gold_units

DESCRIPTION = """\
The parser reads the treebank's text, as tools/preprocess_data.py would give it, and its words are brought onto the gold
words by character. UAS and LAS are over all gold words, with root and punct (and without punct beside it). UUAS ignores
the direction of edges. It is done twice: each sentence by itself, and whole paragraphs, which the parser has to cut
itself.

Parsers and treebanks may follow different schemes. spaCy's English models have ClearNLP labels: prepositions and
copulas are heads there and dependents in Universal Dependencies, so these edges can never agree, and UAS says how far
the edges are UD, not only how good the parser is. LAS takes a table from ClearNLP to UD labels
(megatron_sas/evaluation/parser_quality.py). The figures per relation show which edges are affected."""


def main() -> None:
    """Parse, score, print and write."""
    arguments = parse_arguments()
    check_output(arguments.output, arguments.overwrite)
    check_predicts(arguments.parser)
    description = describe_parser(arguments.parser, arguments.parser_ops)
    reader, reading = find_reader(str(arguments.treebank)), Reading()
    if reader is None or not reader.gold:
        raise InputError(f"{arguments.treebank}: is not CoNLL-U; the parser needs text, which other treebanks lack")
    sentences = [unit.content for unit in read_units([str(arguments.treebank)], reading)]
    parser, results = make_parser(arguments.parser, ops := description.get("ops", SPACY)), {}
    for kind in ("sentence", "paragraph"):
        units = gold_units(sentences, paragraphs=kind == "paragraph")
        start = time.perf_counter()
        results[kind] = {"units": len(units), **evaluate_parser(units, parser)}
        results[kind]["words_per_second"] = results[kind]["words"] / (time.perf_counter() - start)
        if ops != SPACY:
            plain = make_parser(arguments.parser, SPACY)
            results[kind]["heads_unlike_spacy"] = differing_heads([unit.text for unit in units], parser, plain)
    print("\n".join([*table(results), *filter(None, [blanked_note(reading.counts["sentences_blanked"])])]))
    record = {
        "parser": description,
        "treebank": {"path": str(arguments.treebank), "sha256": sha256_file(arguments.treebank)},
        "sentences": len(sentences),
        "sentences_blanked": reading.counts["sentences_blanked"],
        **results,
    }
    write_json_atomic(arguments.output, record)
    print(f"wrote {arguments.output}")


def table(results: dict) -> list[str]:
    """Lines to print: relations of the sentence-wise parse, then the overall figures of both."""
    rows = results["sentence"]["relations"]
    lines = [f"{'gold relation':<14} {'words':>6} {'UAS':>6} {'UUAS':>6} {'LAS':>6}  labels given"]
    for relation, row in rows.items():
        given = ", ".join(f"{name} {count / row['count']:.0%}" for name, count in list(row["predicted"].items())[:3])
        either = f"{row['uuas']:6.3f}" if row["uuas"] is not None else f"{'':>6}"
        lines.append(f"{relation:<14} {row['count']:>6} {row['uas']:6.3f} {either} {row['las']:6.3f}  {given}")
    lines += ["", f"{'':<34} {'sentences':>10} {'paragraphs':>10}"]
    for name, label in (
        ("uas", "UAS"),
        ("las", f"LAS (labels: {results['sentence']['labels']})"),
        ("uas_without_punct", "UAS without punct"),
        ("las_without_punct", "LAS without punct"),
        ("uuas", "UUAS (edges in either direction)"),
        ("edge_precision", "share of the parser's edges right"),
    ):
        lines.append(f"{label:<34} {results['sentence'][name]:>10.4f} {results['paragraph'][name]:>10.4f}")
    one, other = results["sentence"], results["paragraph"]
    label = "words without a prediction"
    lines.append(f"{label:<34} {one['words_without_prediction']:>10,} {other['words_without_prediction']:>10,}")
    lines.append(f"{one['words']:,} words; {one['units']:,} sentences, {other['units']:,} paragraphs")
    if "heads_unlike_spacy" in one:
        counts = " and ".join("{differing:,} of {words:,}".format(**row["heads_unlike_spacy"]) for row in (one, other))
        lines.append(f"words with another head than by spaCy's own products: {counts}")
    return lines


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    usage = f"{predictor_usage()}, as for tools/preprocess_data.py"
    parser.add_argument("--parser", required=True, metavar="KIND:NAME", help=usage)
    parser.add_argument("--parser-ops", choices=CHOICES, default=CHOICES[0], help=OPS_HELP)
    parser.add_argument("--treebank", required=True, type=Path, metavar="FILE", help="CoNLL-U with gold heads")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE.json", help="the figures, with all relations"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
