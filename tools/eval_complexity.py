#!/usr/bin/env python3
"""How complex a model is: TwoNN intrinsic dimension of its [CLS] vectors on held-out text, and its weight norm."""

from __future__ import annotations

import argparse
from pathlib import Path

import _checkout
from megatron_sas.core.cli import InputError, run_main
from megatron_sas.core.files import sha256_file
from megatron_sas.corpus.readers.registry import READERS_BY_SCHEME
from megatron_sas.data.unknown import Unknown
from megatron_sas.evaluation.command_line import check_arguments, evaluation_parser, evaluation_pass, write_result

DESCRIPTION = """\
Read the vector of [CLS] in the last hidden layer of many sequences of text (nothing is masked) and estimate on how many
dimensions these vectors lie, by TwoNN (Facco et al. 2017): the ratio of the distances to the second and to the first
neighbour, fitted without its largest 10 %. Equal texts and equal vectors count once. The standard error is that of
drawing the points; the estimate also depends on how many there are and how long they are, so compare models on the same
text only.

--text is a file as for tools/preprocess_data.py (.txt, .jsonl, .conllu, also compressed), which is packed as there into
sequences of --seq-length, or the prefix of packed data. Beside it stands the Euclidean norm of all weights."""


def main() -> None:
    arguments = parse_arguments()
    device = check_arguments(arguments)
    if arguments.num_texts < 10:
        raise InputError(f"--num-texts: {arguments.num_texts} is below 10; the estimate needs some hundred")
    if arguments.text.startswith(tuple(READERS_BY_SCHEME)):
        raise InputError("--text: is a file or packed data; pack the dataset with tools/preprocess_data.py")
    from megatron_sas.evaluation.complexity import cls_vectors, intrinsic_dimension, weight_norm
    from megatron_sas.evaluation.text import open_packed_text, pack_file, packed_text, plain_text, unknown_in
    from megatron_sas.run.reading import load_model

    model, tokenizer = load_model(arguments.model, device)
    longest = model.config.max_position_embeddings
    if Path(f"{arguments.text}.json").is_file():
        if arguments.seq_length is not None:
            raise InputError("--seq-length: packed data has its own sequence length; leave it out")
        packed = open_packed_text(arguments.text, tokenizer, longest)
        total, seq_length = min(arguments.num_texts, packed.num_sequences), packed.seq_length
        batches = packed_text(packed, num_sequences=total, batch_tokens=arguments.batch_tokens)
        unknown = unknown_in(packed, total)
        rows = packed.tokens[:total]
        text = {"prefix": str(Path(arguments.text).resolve()), "fingerprint": packed.fingerprint}
    else:
        seq_length = min(128, longest) if arguments.seq_length is None else arguments.seq_length
        if not 4 <= seq_length <= longest:
            raise InputError(f"--seq-length: {seq_length} is not between 4 and the model's maximum of {longest}")
        rows = pack_file(
            arguments.text,
            tokenizer,
            seq_length=seq_length,
            num_sequences=arguments.num_texts,
            text_field=arguments.text_field,
        )
        total, batches = len(rows), plain_text(rows, arguments.batch_tokens)
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
        unknown = Unknown.of(rows, tokenizer.unk_token_id, special)
        text = {"path": str(Path(arguments.text).resolve()), "sha256": sha256_file(arguments.text)}
    forwards = -(-total // max(1, arguments.batch_tokens // seq_length))
    with evaluation_pass(arguments, model, forwards, "complexity"):
        vectors = cls_vectors(model, batches, total)
    result, norm = intrinsic_dimension(vectors, rows), weight_norm(model)
    print("\n".join([*lines(result, norm, total, seq_length), unknown.line("this text")]))
    values = {
        "text": {**text, "sequences": total, "seq_length": seq_length},
        "unknown": unknown.record(),
        "intrinsic_dimension": result,
        "weight_norm": norm,
    }
    write_result(arguments, model, tokenizer, values)


def lines(result: dict, norm: float, total: int, seq_length: int) -> list[str]:
    """What is printed."""
    if result["twonn"] is None:
        dimension = "none: too few different vectors, or vectors that are not finite"
    else:
        dimension = f"{result['twonn']:.3f} ± {result['standard_error']:.3f}"
    return [
        f"intrinsic dimension  {dimension}",
        f"weight norm          {norm:.4f}",
        f"{total} sequences of {seq_length} tokens: {result['num_points']} different vectors, "
        f"{result['duplicates']} repeated",
    ]


def parse_arguments() -> argparse.Namespace:
    parser = evaluation_parser(DESCRIPTION, batch_tokens=8192)
    parser.add_argument("--text", required=True, metavar="FILE|PREFIX", help="a text file, or prefix of packed data")
    parser.add_argument("--num-texts", type=int, default=2000, metavar="N", help="the first N sequences (2000)")
    parser.add_argument(
        "--seq-length", type=int, metavar="S", help="tokens a sequence of a text file, with [CLS] and [SEP] (128)"
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of JSON lines (text)")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
