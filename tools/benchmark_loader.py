#!/usr/bin/env python3
"""Tokens/s of our loader beside Hugging Face `datasets` with DataCollatorForLanguageModeling, on the same sequences.

    python tools/benchmark_loader.py --data data/wiki-train --output loader.json

Ours are shuffled, masked batches with the positions and labels of masked tokens and the heads; `ours` makes each batch
when it is asked for, `ours, prefetch` ahead in a thread, as in training. `hf` is what transformers' example run_mlm.py
does: a `datasets.Dataset` of the same token ids and their special_tokens_mask, memory-mapped from disk, through torch's
DataLoader (shuffled) and the collator: ids and labels, no heads. `hf, torch` has the data set return tensors,
`hf, heads` also carries the heads along. All in one process and one thread, in turns; ratios are medians of the ratios
within a round. Times are by the clock and in CPU seconds of this process, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _checkout

os.environ["HF_HUB_OFFLINE"] = "1"

from megatron_sas.core.cli import InputError, run_main
from megatron_sas.core.files import check_absent, write_json_atomic
from megatron_sas.data.packed import PackedData
from megatron_sas.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch

    from megatron_sas.core.benchmark import Times

MASK_PROB = 0.15
PEERS = ("hf", "hf, torch", "hf, heads")


def our_batches(packed: PackedData, batch: int, prefetch: bool) -> Callable[[int], Iterator[torch.Tensor]]:
    """A function that gives the masked ids of the batches of a number of steps."""
    from megatron_sas.data.loader import PrefetchLoader
    from megatron_sas.data.mlm_dataset import MLMDataset

    data = MLMDataset(
        packed, seed=1, mask_prob=MASK_PROB, global_batch_size=batch, micro_batch_size=batch, rank=0, world_size=1
    )

    def batches(steps: int) -> Iterator[torch.Tensor]:
        if not prefetch:
            for step in range(steps):
                yield data.window(step).micro_batches[0].input_ids
            return
        with PrefetchLoader(data, 0, steps) as loader:
            for window in loader:
                yield window.micro_batches[0].input_ids

    return batches


def hf_batches(
    packed: PackedData, tokenizer: Any, batch: int, folder: Path, *, heads: bool = False, tensors: bool = False
) -> Callable[[int], Iterator[torch.Tensor]]:
    """The same for a `datasets.Dataset` on disk, DataLoader and DataCollatorForLanguageModeling."""
    import datasets
    import numpy as np
    import torch
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForLanguageModeling

    datasets.disable_progress_bars()
    tokens = np.asarray(packed.tokens, dtype=np.int32)
    columns = {
        "input_ids": tokens,
        "special_tokens_mask": np.isin(tokens, packed.tokenizer.special_ids).astype(np.int8),
    }
    if heads:
        columns["heads"] = np.asarray(packed.heads)
    path = folder / f"heads-{heads}-tensors-{tensors}"
    datasets.Dataset.from_dict({name: list(rows) for name, rows in columns.items()}).save_to_disk(path)
    dataset = datasets.load_from_disk(path)
    if tensors:
        dataset = dataset.with_format("torch")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_PROB)
    generator = torch.Generator().manual_seed(1)

    def batches(steps: int) -> Iterator[torch.Tensor]:
        loader = DataLoader(
            dataset, batch_size=batch, shuffle=True, drop_last=True, generator=generator, collate_fn=collator
        )
        while steps > 0:
            for _, values in zip(range(steps), loader, strict=False):
                yield values["input_ids"]
                steps -= 1

    return batches


def main() -> None:
    """Measure in turns and print a table."""
    arguments = parse_arguments()
    if arguments.output is not None:
        check_absent(arguments.output, arguments.overwrite)
    import torch

    from megatron_sas.core.benchmark import describe_device, time_interleaved

    packed = PackedData(arguments.data)
    if packed.num_sequences < arguments.batch:
        raise InputError(f"--batch {arguments.batch}: {arguments.data} has only {packed.num_sequences} sequences")
    torch.set_num_threads(1)
    tokenizer, batch = load_tokenizer(arguments.tokenizer or packed.tokenizer.path), arguments.batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaders = {
            "ours": our_batches(packed, batch, prefetch=False),
            "ours, prefetch": our_batches(packed, batch, prefetch=True),
            "hf": hf_batches(packed, tokenizer, batch, folder),
            "hf, torch": hf_batches(packed, tokenizer, batch, folder, tensors=True),
            "hf, heads": hf_batches(packed, tokenizer, batch, folder, heads=True),
        }
        steps = max(10, arguments.tokens // (batch * packed.seq_length))
        # A tenth for the peers: they are an order of magnitude slower.
        counts = {name: steps // 10 if name in PEERS else steps for name in loaders}
        variants = {name: partial(consume, loaders[name], counts[name]) for name in loaders}
        times = time_interleaved(variants, arguments.rounds, torch.device("cpu"), warmup=1)
    tokens = {name: count * batch * packed.seq_length for name, count in counts.items()}
    result = {
        "device": describe_device(torch.device("cpu")),
        "versions": {name: version(name) for name in ("numpy", "datasets", "transformers")},
        "data": {"sequences": packed.num_sequences, "seq_length": packed.seq_length, "batch": batch},
        "rounds": arguments.rounds,
        **summary(times, tokens),
    }
    print(f"{result['device']['name']}, load average {result['device']['load_average']}, {result['data']}")
    print("\n".join(table(result)))
    if arguments.output is not None:
        write_json_atomic(arguments.output, result)
        print(f"wrote {arguments.output}")


def consume(loader: Callable[[int], Iterator[torch.Tensor]], steps: int) -> None:
    """Take `steps` batches."""
    count = sum(1 for _ in loader(steps))
    if count != steps:
        raise RuntimeError(f"{count} batches instead of {steps}")


def summary(times: dict[str, Times], tokens: dict[str, int]) -> dict[str, Any]:
    """Tokens per second (medians), and ours / theirs."""
    from megatron_sas.core.benchmark import median_ratio

    clocks = ("wall", "cpu")
    speeds = {
        name: {clock: tokens[name] / statistics.median(getattr(row, clock)) for clock in clocks}
        for name, row in times.items()
    }
    ratios = {
        f"{ours} / {theirs}": {
            clock: median_ratio(getattr(times[theirs], clock), getattr(times[ours], clock))
            * (tokens[ours] / tokens[theirs])
            for clock in clocks
        }
        for ours in times
        if ours not in PEERS
        for theirs in PEERS
    }
    return {"tokens_per_second": speeds, "ratios": ratios}


def table(result: dict[str, Any]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| | million tokens/s by the clock | by CPU time |", "|---|---:|---:|"]
    for name, row in result["tokens_per_second"].items():
        lines.append(f"| {name} | {row['wall'] / 1e6:.2f} | {row['cpu'] / 1e6:.2f} |")
    lines += [f"| {name} | {row['wall']:.1f} × | {row['cpu']:.1f} × |" for name, row in result["ratios"].items()]
    return lines


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="PREFIX", help="--output of tools/preprocess_data.py")
    parser.add_argument("--tokenizer", metavar="VOCAB_OR_DIR", help="if it is no longer where the data's header says")
    parser.add_argument("--batch", type=int, default=64, help="sequences a batch (64)")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="tokens a round; hf a tenth (20000000)")
    parser.add_argument("--rounds", type=int, default=7, help="every way once a round (7)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the figures")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
