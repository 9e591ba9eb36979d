#!/usr/bin/env python3
"""Time a training step of ModernBERT against one of the BERT of the same named size, in alternating rounds.

A step is forward with the SAS term, backward, clipping and AdamW, in float32, without dropout. `global` is the
ModernBERT whose attention is global in all layers, so that what windows save stands by itself. Ratios are medians of
the ratios within a round; those of CPU time hardly depend on what else runs.

    python tools/benchmark_architectures.py --size mini --seq-length 512 --batch 4 --output FILE.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import _checkout
from megatron_sas.core.cli import run_main
from megatron_sas.core.files import write_json_atomic
from megatron_sas.model.config import SIZES, ModelConfig

VOCABULARY, MASK_PROB = 30522, 0.15
VARIANTS = {
    "bert": ("bert", {"hidden_dropout": 0.0}),
    "modernbert": ("modernbert", {}),
    "global": ("modernbert", {"global_attn_every_n_layers": 1}),
}


def main() -> None:
    arguments = parse_arguments()
    import torch

    from megatron_sas.core.benchmark import describe_device, median_ratio, time_interleaved
    from megatron_sas.model.architectures import build_model
    from megatron_sas.run.throughput import flops_per_token

    torch.set_num_threads(arguments.threads)
    configs = {name: shape(name, arguments) for name in VARIANTS}
    steps = {name: training_step(config, arguments) for name, config in configs.items()}
    device = torch.device("cpu")
    before = describe_device(device)
    times = time_interleaved(steps, arguments.rounds, device)
    result = {"arguments": vars(arguments) | {"output": None}, "device": before, "variants": {}}
    for name, config in configs.items():
        flops = flops_per_token(config, arguments.seq_length, MASK_PROB)
        found = {
            "parameters": sum(p.numel() for p in build_model(config).parameters()),
            "megaflops_per_token": flops / 1e6,
            "wall_ms": 1e3 * statistics.median(times[name].wall),
            "cpu_ms": 1e3 * statistics.median(times[name].cpu),
            "wall_ratio": median_ratio(times[name].wall, times["bert"].wall),
            "cpu_ratio": median_ratio(times[name].cpu, times["bert"].cpu),
        }
        result["variants"][name] = found
        print(f"{name:<12}" + "  ".join(f"{key} {value:,.4g}" for key, value in found.items()))
    if arguments.output is not None:
        write_json_atomic(arguments.output, result)


def shape(name: str, arguments: argparse.Namespace) -> ModelConfig:
    """The configuration of a variant."""
    from megatron_sas.model.architectures import ARCHITECTURES

    architecture, fields = VARIANTS[name]
    same = {"architecture": architecture, "size": arguments.size, "attention_dropout": 0.0}
    section = ARCHITECTURES[architecture].SECTION(
        **same, **fields, max_position_embeddings=max(arguments.seq_length, 3)
    )
    return section.shape(VOCABULARY, 0)


def training_step(config: ModelConfig, arguments: argparse.Namespace) -> Callable[[], None]:
    """A closure that trains a model of its own on the batch that all variants share."""
    import torch

    from megatron_sas.model.architectures import build_model
    from megatron_sas.objective.pretraining import MaskedLMWithTerms
    from megatron_sas.objective.sas import SasSection, SasTerm

    torch.manual_seed(0)
    size = (arguments.batch, arguments.seq_length)
    ids, masked = torch.randint(5, VOCABULARY, size), torch.rand(size) < MASK_PROB
    positions, labels = masked.flatten().nonzero().squeeze(1), ids[masked]
    heads = torch.arange(size[1]) + torch.randint(-4, 5, size)  # short edges, as those of dependencies are
    heads = torch.where((heads >= 0) & (heads < size[1]) & (torch.rand(size) < 0.7), heads, -1)
    module = MaskedLMWithTerms(build_model(config), {"sas": SasTerm(SasSection())}).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        scales = {"sas": 0.001 / size[0]}
        module(ids, positions, labels, heads, mlm_scale=1.0 / len(labels), term_scales=scales).loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="mini", help="named size of both (mini)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of a sequence (512)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (4)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (10)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
