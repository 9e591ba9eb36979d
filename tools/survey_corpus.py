"""Before parsing: duplicates in a corpus, and documents that contain sentences which models are evaluated on.

    python tools/survey_corpus.py --input shards/*.jsonl.xz --blimp blimp/data \\
        --treebank en_ewt-ud-test.conllu --output survey.json --workers 8
    python tools/preprocess_data.py --input shards/*.jsonl.xz --exclude survey.json …

Reads text as tools/preprocess_data.py does, without parsing it. The report counts repeated documents (by a hash of
their text), repeated ids, broken input, and evaluation sentences that occur word for word, each with examples; and it
lists the documents that --exclude then leaves out. An input that cannot be read is named, the report is of the others,
and the command ends with code 2.
"""

from __future__ import annotations

import argparse
import time

import _checkout
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.core.files import check_absent, write_json_atomic
from megatron_sas.corpus.inspect.survey import SurveySettings, survey
from megatron_sas.corpus.readers.base import Reading
from megatron_sas.corpus.readers.line_breaks import LINE_BREAKS
from megatron_sas.corpus.readers.registry import find_reader, read_units


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="as for tools/preprocess_data.py")
    parser.add_argument("--output", required=True, metavar="SURVEY.json", help="the report to write")
    parser.add_argument("--blimp", metavar="DIR", help="minimal pairs (*.jsonl): both sentences are looked for")
    parser.add_argument("--treebank", nargs="+", default=[], metavar="FILE", help="CoNLL-U or JSON lines")
    parser.add_argument(
        "--min-words", type=int, default=6, help="look for evaluation sentences of at least so many words (6)"
    )
    parser.add_argument(
        "--exclude",
        nargs="*",
        choices=("duplicates", "contaminated"),
        default=["duplicates", "contaminated"],
        help="what is listed for exclusion (both); repeated documents without the first of them",
    )
    parser.add_argument("--text-field", default="text", help="as for tools/preprocess_data.py")
    parser.add_argument("--rows-per-document", type=int, metavar="N", help="as there, and with the same N")
    parser.add_argument("--line-breaks", choices=LINE_BREAKS, default="auto", help="as there (auto)")
    parser.add_argument("--on-error", choices=("refuse", "skip"), default="refuse", help="as there")
    parser.add_argument("--max-skipped", "--max-loss", type=float, default=0.05, help="as there (0.05)")
    parser.add_argument("--workers", type=int, default=1, help="processes; each takes whole inputs (1)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")
    return parser.parse_args(arguments)


def evaluation_sentences(blimp: str | None, treebanks: list[str]) -> dict[str, list[str]]:
    """The sentences of each evaluation set."""
    from megatron_sas.evaluation.minimal_pairs import load_blimp
    from megatron_sas.evaluation.treebank import load_treebank

    sentences = {}
    if blimp is not None:
        pairs = [pair for pair_set in load_blimp(blimp) for pair in pair_set.pairs]
        sentences["blimp"] = list(dict.fromkeys(sentence for pair in pairs for sentence in pair))
    for path in treebanks:
        reader = find_reader(path)
        if reader is not None and reader.gold:  # such readers know the text as it was written
            sentences[path] = [unit.content.text for unit in read_units([path], Reading())]
        else:
            sentences[path] = [" ".join(sentence.words) for sentence in load_treebank(path)]
    return sentences


def main() -> None:
    """Survey and print a summary."""
    given = vars(parse_arguments())
    output = given.pop("output")
    check_absent(output, given.pop("overwrite"))
    sentences = evaluation_sentences(given.pop("blimp"), given.pop("treebank"))
    settings = SurveySettings(given.pop("input"), sentences, **given)
    start = time.perf_counter()
    report = survey(settings)
    write_json_atomic(output, report)
    print(f"{report['documents']:,} documents, {report['words']:,} words in {time.perf_counter() - start:.0f} s")
    print(f"{report['duplicates']['count']:,} repeat another's text, {report['duplicate_ids']['count']:,} another's id")
    for name, entry in report["contamination"].items():
        print(f"{name}: {entry['found']:,} of {entry['looked_for']:,} sentences found ({entry['sentences']:,} in all)")
    print(f"{output}: lists {sum(len(entry['exclude']) for entry in report['inputs']):,} documents to exclude")
    if report["failed"]:
        raise InputError(
            f"{len(report['failed'])} of {len(settings.inputs)} inputs failed, and {output} is of the others: "
            + "; ".join(entry["reason"] for entry in report["failed"])
        )


if __name__ == "__main__":
    run_main(main)
