#!/usr/bin/env python3
"""Grammatical acceptability of a masked LM: BLiMP, or minimal pairs in its format, by pseudo-log-likelihood."""

from __future__ import annotations

import argparse
from pathlib import Path

import _checkout
from megatron_sas.core.cli import run_main
from megatron_sas.evaluation.blimp_labels import MANY_TIES, METRICS
from megatron_sas.evaluation.command_line import check_arguments, evaluation_parser, evaluation_pass, write_result

DESCRIPTION = """\
Score both sentences of every minimal pair and count how often the good one scores strictly higher (chance is 0.5);
pairs whose scores are the same are counted as ties and as wrong.
A sentence's score is the sum over its tokens of log p(token | all others), one masked copy per token (Salazar et al.
2020). Accuracies are reported per set, per linguistic term and per field (means over the sets in each), and overall
(mean over all sets). All of BLiMP is 1.3 million masked copies: use --pairs-per-set for a quick look."""


def main() -> None:
    arguments = parse_arguments()
    from megatron_sas.evaluation.minimal_pairs import BlimpTask, load_blimp, sha256_folder
    from megatron_sas.run.reading import load_model

    device = check_arguments(arguments)
    data = load_blimp(arguments.blimp)
    model, tokenizer = load_model(arguments.model, device)
    task = BlimpTask(data, tokenizer, arguments.metric, arguments.pairs_per_set, model.config.max_position_embeddings)
    total = task.pll.num_forwards(arguments.batch_tokens)
    with evaluation_pass(arguments, model, total, "BLiMP"):
        result = task.evaluate(model, batch_tokens=arguments.batch_tokens)
    print("\n".join([*table(result), task.pll.unknown.line("these sentences")]))
    data = {"path": str(arguments.blimp.resolve()), "sha256": sha256_folder(arguments.blimp)}
    write_result(arguments, model, tokenizer, {"data": data, **result})


def table(result: dict) -> list[str]:
    """Lines to print: terms under their fields, then the overall figures."""
    lines = [f"{'field / term':<36} {'sets':>5} {'accuracy':>9} {'ties':>6}"]
    for field, accuracy in result["fields"].items():
        within = [row for row in result["sets"].values() if row["field"] == field]
        lines.append(f"{field:<36} {len(within):>5} {accuracy:>9.3f} {sum(row['ties'] for row in within):>6}")
        for term in sorted({row["linguistics_term"] for row in within}):
            rows = [row for row in within if row["linguistics_term"] == term]
            mean = sum(row["accuracy"] for row in rows) / len(rows)
            lines.append(f"  {term:<34} {len(rows):>5} {mean:>9.3f} {sum(row['ties'] for row in rows):>6}")
    lines += [
        "",
        f"overall {result['blimp']:.4f}   mean of {result['num_sets']} sets, "
        f"{result['num_pairs']} pairs, {result['metric']}",
        f"{result['num_sentences']} sentences, {result['num_masked_copies']} masked copies in "
        f"{result['seconds']:.1f} s: {result['sentences_per_second']:.1f} sentences/s",
    ]
    if result["num_ties"]:
        warning = "warning: " if result["num_ties"] > MANY_TIES * result["num_pairs"] else ""
        lines.append(
            f"{warning}{result['num_ties']} ties, which count as wrong; {result['num_identical']} pairs of identical "
            "sentences"
        )
    if result["num_non_finite"]:
        lines.append(f"warning: {result['num_non_finite']} scores are not finite; their pairs count as wrong")
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = evaluation_parser(DESCRIPTION, batch_tokens=8192)
    parser.add_argument("--blimp", required=True, type=Path, metavar="DIR", help="folder with the .jsonl files")
    parser.add_argument(
        "--metric",
        choices=METRICS,
        default=METRICS[0],
        help="pll: mask one token at a time (default); within_word_l2r: also the later pieces of its word (Kauf & "
        "Ivanova 2023)",
    )
    parser.add_argument(
        "--pairs-per-set", type=int, metavar="N", help="only the first N pairs of each set (default: all)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
