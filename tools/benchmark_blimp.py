#!/usr/bin/env python3
"""Seconds of scoring minimal pairs: this checkout, another one, and minicons, in turn.

    git worktree add ../before COMMIT
    python tools/benchmark_blimp.py --blimp DIR --vocab vocab.txt --size mini --against ../before --output FILE.json

All score the same pairs, evenly spaced over all sets, with the same untrained BERT, each in a process of its own that
waits while another one works. A turn is every masked copy of every sentence; reading and tokenizing come before it. CPU
time is that of all threads of the process, and steadier than the clock where other programs run; ratios are medians of
the ratios within a round, above 1 where this checkout is faster. minicons gets --peer-sentences sentences a batch, of
similar length. Scores must agree to 1e-4 a token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _checkout
from megatron_sas.core.cli import InputError, progress, run_main
from megatron_sas.core.files import check_absent, write_json_atomic
from megatron_sas.evaluation.blimp_labels import METRICS
from megatron_sas.model.config import SIZES

THIS, AGAINST, MINICONS = "this", "against", "minicons"
TOLERANCE = 1e-4  # of a sentence's score, a token

COMMON = """
import json, os, sys, time
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what a library prints is not an answer
import torch
given = json.loads(sys.stdin.readline())
torch.set_num_threads(given["threads"])
sentences = given["sentences"]
"""
OURS = """
import megatron_sas
assert os.path.dirname(os.path.dirname(megatron_sas.__file__)) == given["checkout"], megatron_sas.__file__
try:
    from megatron_sas.run.reading import load_model
except ImportError:  # commit eb96e8e
    from megatron_sas.model.pretrained import load_model
from megatron_sas.evaluation.pll import PllTask
try:
    from megatron_sas.core.processes import keep_freed_memory  # as the tools that evaluate do
    keep_freed_memory()
except ImportError:
    pass
model, tokenizer = load_model(given["model"])
task = PllTask(sentences, tokenizer, given["metric"])
def score():
    return task.score(model, batch_tokens=given["batch_tokens"]).tolist()
"""
PEER = """
from minicons.scorer import MaskedLMScorer
from transformers import AutoTokenizer, BertForMaskedLM
tokenizer = AutoTokenizer.from_pretrained(given["model"])
if not hasattr(tokenizer, "batch_encode_plus"):  # minicons 0.3.39 calls it, transformers 5 removed it
    type(tokenizer).batch_encode_plus = lambda self, *arguments, **options: self(*arguments, **options)
model = MaskedLMScorer(BertForMaskedLM.from_pretrained(given["model"]).eval(), "cpu", tokenizer=tokenizer)
order = sorted(range(len(sentences)), key=lambda i: len(tokenizer(sentences[i])["input_ids"]))
metric = {"pll": "original"}.get(given["metric"], given["metric"])
def score():
    found = [0.0] * len(sentences)
    for start in range(0, len(order), given["peer_sentences"]):
        part = order[start : start + given["peer_sentences"]]
        batch = [sentences[i] for i in part]
        total = model.sequence_score(batch, reduction=lambda x: x.sum(0).item(), PLL_metric=metric)
        for i, value in zip(part, total):
            found[i] = value
    return found
"""
TURNS = """
print(json.dumps([len(tokenizer(sentence)["input_ids"]) - 2 for sentence in sentences]), file=answers)
for _ in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    scores = score()
    values = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "scores": scores}
    print(json.dumps(values), file=answers)
"""


class Scorer:
    """A process that scores all sentences whenever it is asked to."""

    def __init__(self, code: str, checkout: Path, given: dict[str, Any], log: Path) -> None:
        self._log = log
        environment = os.environ | {"PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
        given = given | {"checkout": str(checkout)}
        command = [sys.executable, "-c", COMMON + code + TURNS]
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
                env=environment, cwd=checkout,  # which `python -c` imports from before all else
            )  # fmt: skip
        self.lengths: list[int] = self._ask(json.dumps(given))  # tokens of each sentence

    def turn(self) -> dict[str, Any]:
        """Seconds `wall` and `cpu`, and the `scores`."""
        return self._ask("")

    def _ask(self, line: str) -> Any:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise InputError(f"{self._log.stem}: {self._log.read_text('utf-8').strip()[-1000:] or 'it ended'}")
        return json.loads(answer)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of all, round by round, and the ratios to this checkout."""
    import torch

    from megatron_sas.core.benchmark import describe_device, median_ratio

    sentences = sample(arguments.blimp, arguments.pairs)
    here = Path(__file__).resolve().parents[1]
    variants = {THIS: (OURS, here)}
    if arguments.against is not None:
        variants[AGAINST] = (OURS, arguments.against.resolve())
    if arguments.peer:
        variants[MINICONS] = (PEER, here)
    names = ("threads", "metric", "batch_tokens", "peer_sentences")
    given = {name: getattr(arguments, name) for name in names} | {"sentences": sentences}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    order, scorers, difference = random.Random(0), {}, dict.fromkeys(variants, 0.0)
    torch.set_num_threads(arguments.threads)
    device = describe_device(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        given["model"] = write_model(arguments, Path(folder) / "model")
        try:
            for name, (code, checkout) in variants.items():
                scorers[name] = Scorer(code, checkout, given, Path(folder) / f"{name}.log")
            tokens = scorers[THIS].lengths
            for number in progress(range(-1, arguments.rounds), unit="round", desc="scoring"):
                found = {name: scorers[name].turn() for name in order.sample([*variants], len(variants))}
                scores = {name: values.pop("scores") for name, values in found.items()}
                for name, values in found.items():
                    pairs = zip(scores[name], scores[THIS], tokens, strict=True)
                    difference[name] = max(difference[name], *(abs(a - b) / count for a, b, count in pairs))
                    if number >= 0:
                        turns[name].append(values)
        finally:
            for scorer in scorers.values():
                scorer.close()
    for name, value in difference.items():
        if not value <= TOLERANCE:
            raise InputError(f"{name}: scores differ from this checkout's by {value:.2g} a token")
    clocks = ("cpu", "wall")
    return {
        "device": device,
        "settings": {**vars(arguments), "blimp": None, "vocab": None, "against": None, "output": None},
        "sentences": len(sentences),
        "masked_copies": sum(tokens),
        "seconds": {n: {c: statistics.median(turn[c] for turn in turns[n]) for c in clocks} for n in variants},
        "ratios": {
            n: {c: median_ratio([t[c] for t in turns[n]], [t[c] for t in turns[THIS]]) for c in clocks}
            for n in variants
            if n != THIS
        },
        "largest_difference_a_token": difference,
        "rounds": turns,
    }


def sample(blimp: Path, count: int) -> list[str]:
    """Both sentences of `count` pairs, evenly spaced over all sets."""
    from megatron_sas.evaluation.minimal_pairs import load_blimp

    pairs = [pair for pair_set in load_blimp(blimp) for pair in pair_set.pairs]
    count = min(count, len(pairs))
    return [sentence for number in range(count) for sentence in pairs[number * len(pairs) // count]]


def write_model(arguments: argparse.Namespace, path: Path) -> str:
    """An untrained BERT of a named size as transformers writes it, with its tokenizer."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = BertTokenizerFast(vocab=str(arguments.vocab))
    size = SIZES[arguments.size]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=size["num_layers"],
        num_attention_heads=size["num_heads"],
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
    )
    BertForMaskedLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--blimp", required=True, type=Path, metavar="DIR", help="folder with BLiMP's .jsonl files")
    parser.add_argument("--vocab", required=True, type=Path, metavar="FILE", help="WordPiece vocabulary, vocab.txt")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout (default: none)")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="minicons too (yes)")
    parser.add_argument("--size", choices=tuple(SIZES), default="mini", help="of the model (mini)")
    parser.add_argument("--metric", choices=METRICS, default=METRICS[0], help="how a sentence is scored (pll)")
    parser.add_argument("--pairs", type=int, default=134, metavar="N", help="pairs of sentences (134)")
    parser.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="as for eval_blimp.py (8192)")
    parser.add_argument("--peer-sentences", type=int, default=8, metavar="N", help="of a batch of minicons (8)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (1)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="timed rounds, after one that is not (7)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.output is not None:
        check_absent(arguments.output, overwrite=False)
    result = measure(arguments)
    print(", ".join(f"{name} {value}" for name, value in result["device"].items()))
    print(f"{result['sentences']} sentences, {result['masked_copies']} masked copies, {arguments.rounds} rounds")
    for name, seconds in result["seconds"].items():
        line = f"{name:<10} {seconds['cpu']:8.2f} s of CPU {seconds['wall']:8.2f} s"
        if name in result["ratios"]:
            ratio = result["ratios"][name]
            line += f"   {ratio['cpu']:.2f} and {ratio['wall']:.2f} times this checkout's"
        print(line)
    if arguments.output is not None:
        write_json_atomic(arguments.output, result)


if __name__ == "__main__":
    run_main(main)
