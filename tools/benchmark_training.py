"""Seconds of one training step (forward, backward, AdamW) of this project and of its peers, in one run.

    python tools/benchmark_training.py --model mini --seq-length 512 --batch 4 --pairs 10 --output mini.json

Four variants take turns on the same random tokens, masks and dependency heads, from the same weights:

    ours_max   this project with the `max` regularizer
    ours_mlm   this project without the regularizer (λ = 0, not measured)
    paper      the regularizer as the paper computes it: transformers' eager attention, `output_attentions=True`,
               the maps stacked to [L, B, H, S, S], LM head on all positions
    hf_sdpa    transformers' sdpa attention without the regularizer, LM head on all positions

Attention dropout is 0 everywhere (not every attention kernel has it); hidden dropout is as in BERT. Every number is a
median over rounds, every ratio the median of the ratios within a round. CPU time is that of all threads, and steadier
than the clock where other programs run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch
from torch import Tensor, nn

from megatron_sas.cli import InputError, run_main
from megatron_sas.files import refuse_existing, write_json_atomic
from megatron_sas.metrics.benchmark import choose_device, describe_device, median_ratio, time_interleaved
from megatron_sas.model import SIZES, Bert, BertConfig
from megatron_sas.model.huggingface import to_hf_config, to_hf_state
from megatron_sas.objective.pretraining import MaskedLMWithSas, SasObjective

SAS_WEIGHT = 0.001
VARIANTS = ("ours_max", "ours_mlm", "paper", "hf_sdpa")
RATIOS = (("paper", "ours_max"), ("ours_max", "ours_mlm"), ("hf_sdpa", "ours_mlm"))


@dataclass(frozen=True)
class Batch:
    """One batch; tensors int64."""

    input_ids: Tensor  # (B, S)
    masked_positions: Tensor  # (M,) flat
    labels: Tensor  # (M,)
    heads: Tensor  # (B, S)
    full_labels: Tensor  # (B, S), -100 where not masked


def random_batch(batch: int, seq: int, vocab_size: int, seed: int, device: torch.device) -> Batch:
    """Random tokens, 15 % masked; three tokens in four have a head, most of them one to three tokens away."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, vocab_size, (batch, seq), generator=generator)
    masked = torch.rand(batch, seq, generator=generator) < 0.15
    distance = torch.empty(batch, seq).geometric_(0.35, generator=generator).long()
    sign = torch.randint(0, 2, (batch, seq), generator=generator) * 2 - 1
    heads = torch.arange(seq) + sign * distance
    has_edge = (torch.rand(batch, seq, generator=generator) < 0.75) & (heads >= 0) & (heads < seq)
    batch_ = Batch(
        input_ids=torch.where(masked, 4, tokens),
        masked_positions=masked.flatten().nonzero().squeeze(1),
        labels=tokens[masked],
        heads=torch.where(has_edge, heads, -1),
        full_labels=torch.where(masked, tokens, -100),
    )
    return Batch(**{name: tensor.to(device) for name, tensor in vars(batch_).items()})


def paper_sas_term(attentions: tuple[Tensor, ...], heads: Tensor) -> Tensor:
    """R summed over the batch from all attention maps `(B, H, S, S)` per layer, kept and stacked."""
    maps = torch.stack(attentions)  # (L, B, H, S, S)
    sequence, dependent = torch.nonzero(heads >= 0, as_tuple=True)
    head = heads[sequence, dependent]
    to_head = maps[:, sequence, :, dependent, head].flatten(1)  # (edges, L·H)
    to_dependent = maps[:, sequence, :, head, dependent].flatten(1)
    return to_head.amax(1).sum() + to_dependent.amax(1).sum()


def build_variants(
    config: BertConfig, batch: Batch, device: torch.device, precision: str, seed: int, names: list[str]
) -> dict[str, Callable[[], None]]:
    """One closure per variant that takes a whole training step."""
    torch.manual_seed(seed)
    initial = Bert(config).state_dict()
    count, sequences = len(batch.labels), batch.input_ids.shape[0]

    def ours(sas_weight: float) -> tuple[nn.Module, Callable[[], Tensor]]:
        module = MaskedLMWithSas(Bert(config), SasObjective())
        module.bert.load_state_dict(initial)

        def loss() -> Tensor:
            return module(
                batch.input_ids,
                batch.masked_positions,
                batch.labels,
                batch.heads if sas_weight else None,
                mlm_scale=1.0 / count,
                sas_scale=sas_weight / sequences,
            ).loss

        return module, loss

    def transformers_bert(implementation: str, with_maps: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
        from transformers import BertConfig as HFConfig
        from transformers import BertForMaskedLM

        module = BertForMaskedLM(HFConfig(**to_hf_config(config), attn_implementation=implementation))
        module.load_state_dict(to_hf_state(initial, config), strict=False)

        def loss() -> Tensor:
            output = module(batch.input_ids, labels=batch.full_labels, output_attentions=with_maps)
            if not with_maps:
                return output.loss
            return output.loss + SAS_WEIGHT / sequences * paper_sas_term(output.attentions, batch.heads)

        return module, loss

    makers: dict[str, Callable[[], tuple[nn.Module, Callable[[], Tensor]]]] = {
        "ours_max": lambda: ours(SAS_WEIGHT),
        "ours_mlm": lambda: ours(0.0),
        "paper": lambda: transformers_bert("eager", True),
        "hf_sdpa": lambda: transformers_bert("sdpa", False),
    }
    return {name: _training_step(*makers[name](), device, precision) for name in names}


def _training_step(
    module: nn.Module, loss: Callable[[], Tensor], device: torch.device, precision: str
) -> Callable[[], None]:
    module.to(device).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that one step allocates at most, beyond what was there before; None where torch does not count them."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| variant | ms per step | CPU ms per step | tokens/s | peak MiB of a step |",
        "|---|---:|---:|---:|---:|",
    ]
    tokens = result["batch"] * result["seq_length"]
    for name, times in result["times"].items():
        wall, cpu = statistics.median(times["wall"]), statistics.median(times["cpu"])
        memory = result["peak_bytes"][name]
        peak = "-" if memory is None else f"{memory / 2**20:,.0f}"
        lines.append(f"| {name} | {1000 * wall:,.1f} | {1000 * cpu:,.1f} | {tokens / wall:,.0f} | {peak} |")
    lines += ["", "| ratio | by the clock | by CPU time |", "|---|---:|---:|"]
    lines += [f"| {n} | {value:.2f} | {result['cpu_ratios'][n]:.2f} |" for n, value in result["ratios"].items()]
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SIZES), default="mini", help="named size (mini)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens per sequence (512)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (4)")
    parser.add_argument("--vocab-size", type=int, default=30522, help="entries of the vocabulary (30522)")
    parser.add_argument("--pairs", type=int, default=10, help="rounds in which every variant runs once (10)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="which to run (all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (auto)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast (fp32)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (0)")
    parser.add_argument("--output", metavar="FILE.json", help="write every time and the ratios here")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    arguments = parser.parse_args()
    for name in ("seq_length", "batch", "pairs"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name.replace('_', '-')}: must be at least 1")
    if arguments.output:
        refuse_existing(arguments.output, arguments.overwrite)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    config = BertConfig(
        **SIZES[arguments.model],
        vocab_size=arguments.vocab_size,
        max_position_embeddings=max(arguments.seq_length, 512),
        attention_dropout=0.0,
    )
    batch = random_batch(arguments.batch, arguments.seq_length, arguments.vocab_size, arguments.seed, device)
    variants = build_variants(config, batch, device, arguments.precision, arguments.seed, arguments.variants)
    times = time_interleaved(variants, arguments.pairs, device)
    pairs = [(a, b) for a, b in RATIOS if {a, b} <= set(times)]
    result = {
        "device": describe_device(device) | {"transformers": _transformers_version()},
        **{name: getattr(arguments, name) for name in ("model", "seq_length", "batch", "vocab_size", "precision")},
        "masked_tokens": len(batch.labels),
        "edges": int((batch.heads >= 0).sum()),
        "ratios": {f"{a} / {b}": median_ratio(times[a].wall, times[b].wall) for a, b in pairs},
        "cpu_ratios": {f"{a} / {b}": median_ratio(times[a].cpu, times[b].cpu) for a, b in pairs},
        "peak_bytes": {name: peak_memory(step, device) for name, step in variants.items()},
        "times": {name: asdict(value) for name, value in times.items()},
    }
    print(", ".join(f"{name} {value}" for name, value in result["device"].items()))
    print(
        f"{arguments.model}, batch {arguments.batch} × {arguments.seq_length}, {arguments.precision}, "
        f"{arguments.pairs} rounds\n\n{table(result)}"
    )
    if arguments.output:
        write_json_atomic(arguments.output, result)


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


if __name__ == "__main__":
    run_main(main)
