#!/usr/bin/env python3
"""How well single attention heads of a model follow the dependencies of a treebank (UAS, after Clark et al. 2019)."""

from __future__ import annotations

import argparse
from pathlib import Path

import _checkout
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.core.files import sha256_file
from megatron_sas.corpus.readers.trees import blanked_note
from megatron_sas.data.tokenizer import tokenizer_identity
from megatron_sas.evaluation.command_line import check_arguments, evaluation_parser, evaluation_pass, write_result

DESCRIPTION = """\
For every word, take the other word that it attends to most (dep->head) or that attends to it most (head->dep) as its
head, and count how often that is right: for every relation, layer and head. Each relation keeps its best head and
direction; UAS is the mean of these bests over all dependencies. Relations drop their subtype; root and punct do not
count.

Beside each accuracy stands the best fixed-offset baseline (the head is the word n places to the right, n from -3 to 3).
The best heads are chosen on the treebank itself, so a score means something only beside that of the same model before
training: give it with --untrained, for instance the checkpoint of step 0."""

UNTRAINED_NOTE = (
    "best heads are chosen on the treebank itself; report the untrained model (step 0, option --untrained) beside it"
)


def main() -> None:
    arguments = parse_arguments()
    from megatron_sas.evaluation.provenance import model_source
    from megatron_sas.evaluation.treebank import load_treebank
    from megatron_sas.evaluation.uas import TreebankTask
    from megatron_sas.run.reading import load_model

    device = check_arguments(arguments)
    sentences = load_treebank(arguments.treebank)
    model, tokenizer = load_model(arguments.model, device)
    task = TreebankTask(sentences, tokenizer, model.config.max_position_embeddings)
    total, untrained = task.num_forwards(arguments.batch_tokens), None
    if arguments.untrained is not None:
        other, other_tokenizer = load_model(arguments.untrained, device)
        if (
            tokenizer_identity(other_tokenizer) != tokenizer_identity(tokenizer)
            or other.config.max_position_embeddings != model.config.max_position_embeddings
        ):
            raise InputError(
                f"{arguments.untrained}: tokenizer or maximum length differs from that of {arguments.model}; "
                "give step 0 of the same run"
            )
        with evaluation_pass(arguments, other, total, "untrained model"):
            untrained = task.evaluate(other, batch_tokens=arguments.batch_tokens)
        untrained = {**model_source(arguments.untrained), **untrained}
    with evaluation_pass(arguments, model, total, "syntax"):
        result = task.evaluate(model, batch_tokens=arguments.batch_tokens)
    print("\n".join([*table(result, untrained), task.unknown.line("these words")]))
    treebank = {"path": str(arguments.treebank.resolve()), "sha256": sha256_file(arguments.treebank)}
    values = {"treebank": treebank, **result, "untrained": untrained, "note": UNTRAINED_NOTE}
    write_result(arguments, model, tokenizer, values)


def table(result: dict, untrained: dict | None) -> list[str]:
    """Lines to print: relations with enough edges for the table, then the overall figures."""
    last = "  untrained" if untrained else ""
    lines = [
        f"{'relation':<12} {'edges':>6} {'accuracy':>9} {'layer-head':>11} {'direction':<10} {'baseline':>14}{last}"
    ]
    for relation, row in result["relations"].items():
        if row["in_table"]:
            baseline = f"{row['baseline']:.3f} ({row['baseline_offset']:+d})"
            head = f"{row['layer']}-{row['head']}"
            last = f"  {untrained['relations'][relation]['accuracy']:9.3f}" if untrained else ""
            lines.append(
                f"{relation:<12} {row['count']:>6} {row['accuracy']:>9.3f} {head:>11} {row['direction']:<10} "
                f"{baseline:>14}{last}"
            )
    hidden = sum(not row["in_table"] for row in result["relations"].values())
    single = result["single_head"]
    lines += [
        f"(layers and heads count from 0; UAS and the file also have {hidden} relations with fewer than 100 edges)",
        "",
        f"UAS              {result['uas']:.4f}   best fixed offsets {result['uas_baseline']:.4f}",
        f"best single head {result['uas_single_head']:.4f}   {single['layer']}-{single['head']} {single['direction']}",
        f"{result['num_edges']} dependencies in {result['num_sentences']} sentences; "
        f"{result['num_skipped']} too long and skipped",
        *filter(None, [blanked_note(result["num_blanked"])]),
    ]
    if untrained:
        lines.append(
            f"untrained model  {untrained['uas']:.4f}   its best single head {untrained['uas_single_head']:.4f}"
        )
    else:
        lines.append(f"note: {UNTRAINED_NOTE}")
    return lines


def parse_arguments() -> argparse.Namespace:
    parser = evaluation_parser(DESCRIPTION, batch_tokens=4096)
    parser.add_argument(
        "--treebank",
        required=True,
        type=Path,
        metavar="FILE",
        help=".conllu, or .jsonl (one sentence a line) or .json (an array) of objects with lists words, heads (counted "
        "from 1, 0 is the root) and relns",
    )
    parser.add_argument(
        "--untrained", type=Path, metavar="DIR", help="the same model before training, to print beside it"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
