"""Seconds of one training step (forward, backward, AdamW) of this project and of its peers, in one run.

    python tools/benchmark_training.py --model mini --seq-length 512 --batch 4 --pairs 10 --output mini.json
    python tools/benchmark_training.py --model base --batch 32 --dropout 0.1 --precision bf16 --output base.json

Variants take turns on the same random tokens, masks and dependency heads, from the same weights:

    ours_max        this project with the `max` regularizer
    ours_uniform    this project with the `uniform` regularizer
    ours_offset     this project with the term `offset`, of mode max, in place of the regularizer
    ours_entropy    this project with the term `entropy` in place of the regularizer
    ours_mlm        this project without a term (λ = 0, not measured)
    ours_deepspeed  ours_max inside the trainer's engine, which on one process goes past DeepSpeed's wrappers
    ours_flex       ours_max on FlexAttention with its logsumexp (GPU, no attention dropout)
    ours_cudnn, ours_packed, ours_uncompiled, ours_autotuned, ours_graphs
                    ours_max with one thing changed, only where they are named: attention by cuDNN; queries, keys and
                    values in one tensor, and so their gradient (Triton); not compiled; with torch.compile's search
                    for products; in CUDA graphs
    paper           the regularizer as the paper computes it: transformers' eager attention, `output_attentions=True`,
                    the maps stacked to [L, B, H, S, S], LM head on all positions; --paper-batch sequences a step,
                    by default on GPUs as many as fit beside the other variants
    hf_sdpa         transformers' sdpa attention without the regularizer, LM head on all positions

All of them clip gradients to a norm of 1. Ours are compiled as the trainer would (on GPUs, unless --compile says
otherwise). Hidden dropout is BERT's, attention dropout --dropout, 0 by default because not every attention kernel has
it. Each round has an order of its own; on a GPU a turn is one step that is not timed, and then as many in a row as take
0.2 s. Numbers are medians over rounds, ratios of seconds a token are medians of the ratios within a round. CPU time is
that of all threads, and steadier than the clock where other programs run. What lacks GPU memory or a Python package is
left out, and the result says so. MFU counts the arithmetic of encoder, attention and head at masked tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import _checkout
from megatron_sas.core.cli import InputError, first_line, run_main
from megatron_sas.core.device import DEVICE_HELP, choose_device
from megatron_sas.core.files import check_absent, write_json_atomic
from megatron_sas.model.config import SIZES, BertConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from megatron_sas.model.bert import Bert

SAS_WEIGHT = 0.001
TERM_VARIANTS = ("ours_offset", "ours_entropy")
VARIANTS = (
    *("ours_max", "ours_uniform", *TERM_VARIANTS, "ours_mlm", "ours_deepspeed", "ours_flex", "paper", "hf_sdpa"),
)
COMPILE_MODES = {"ours_autotuned": "max-autotune-no-cudagraphs", "ours_graphs": "reduce-overhead"}
CHANGED = ("ours_cudnn", "ours_packed", "ours_uncompiled", *COMPILE_MODES)
CPU_VARIANTS = ("ours_max", "ours_mlm", "paper", "hf_sdpa")
MASK_PROB = 0.15
GRAD_CLIP = 1.0  # the trainer's default
QUEUE_SECONDS = 0.2  # on a GPU
RATIOS = (
    ("paper", "ours_max"),
    ("ours_max", "ours_mlm"),
    ("ours_uniform", "ours_mlm"),
    *((name, "ours_mlm") for name in TERM_VARIANTS),
    ("ours_deepspeed", "ours_max"),
    *((name, "ours_max") for name in ("ours_flex", *CHANGED)),
    ("hf_sdpa", "ours_mlm"),
)


@dataclass(frozen=True)
class Batch:
    """One batch; tensors int64."""

    input_ids: Tensor  # (B, S)
    masked_positions: Tensor  # (M,) flat
    labels: Tensor  # (M,)
    heads: Tensor  # (B, S)
    full_labels: Tensor  # (B, S), -100 where not masked


def random_batch(batch: int, arguments: argparse.Namespace, device: torch.device) -> Batch:
    """Random tokens, 15 % masked; three tokens in four have a head, most of them one to three tokens away."""
    import torch

    seq, vocab_size = arguments.seq_length, arguments.vocab_size
    generator = torch.Generator().manual_seed(arguments.seed)
    tokens = torch.randint(5, vocab_size, (batch, seq), generator=generator)
    masked = torch.rand(batch, seq, generator=generator) < MASK_PROB
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
    import torch

    maps = torch.stack(attentions)  # (L, B, H, S, S)
    sequence, dependent = torch.nonzero(heads >= 0, as_tuple=True)
    head = heads[sequence, dependent]
    to_head = maps[:, sequence, :, dependent, head].flatten(1)  # (edges, L·H)
    to_dependent = maps[:, sequence, :, head, dependent].flatten(1)
    return to_head.amax(1).sum() + to_dependent.amax(1).sum()


@dataclass(frozen=True)
class Setting:
    """What all variants share."""

    config: BertConfig
    device: torch.device
    precision: str
    compiled: bool
    initial: dict[str, Tensor]  # weights

    def bert(self, **changes: Any) -> Bert:
        """A model with the shared weights."""
        from megatron_sas.model.bert import Bert

        bert = Bert(replace(self.config, **changes))
        bert.load_state_dict(self.initial)
        return bert


def build_variant(name: str, setting: Setting, batch: Batch) -> Callable[[], None]:
    """A closure that takes a whole training step."""
    if name == "ours_deepspeed":
        return _deepspeed_step(setting, batch)
    return _training_step(*module_and_loss(name, setting, batch, SAS_WEIGHT), setting)


def module_and_loss(
    name: str, setting: Setting, batch: Batch, sas_weight: float
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """What a variant trains, and a closure that computes its loss."""
    if name in ("paper", "hf_sdpa"):
        return _transformers_bert(setting, batch, sas_weight if name == "paper" else None)
    return _ours(name, setting, batch, 0.0 if name == "ours_mlm" else sas_weight)


def _ours(name: str, setting: Setting, batch: Batch, weight: float) -> tuple[nn.Module, Callable[[], Tensor]]:
    from megatron_sas.objective.pretraining import MaskedLMWithTerms
    from megatron_sas.objective.terms import TERMS

    bert = setting.bert(attention_backend={"ours_flex": "flex", "ours_cudnn": "cudnn"}.get(name, "auto"))
    if name == "ours_packed":
        from megatron_sas.kernels.triton.attention import run_packed

        for layer in bert.layers:
            layer.attention.forward = partial(_packed_attention, layer.attention, run_packed)
    term = name.removeprefix("ours_") if name in TERM_VARIANTS else "sas"
    settings = {"mode": "uniform"} if name == "ours_uniform" else {}
    module = MaskedLMWithTerms(bert, {term: TERMS[term](TERMS[term].section_class(**settings))})
    if setting.compiled and name != "ours_uncompiled":
        module.compile_parts(COMPILE_MODES.get(name))
    count, sequences = int((batch.labels >= 0).sum()), batch.input_ids.shape[0]

    def loss() -> Tensor:
        return module(
            batch.input_ids,
            batch.masked_positions,
            batch.labels,
            batch.heads,
            mlm_scale=1.0 / count,
            term_scales={term: weight / sequences} if weight else {},
        ).loss

    return module, loss


def _packed_attention(
    attention: nn.Module, run_packed: Callable[..., tuple], x: Tensor, heads: Tensor | None, *_: object,
    queries_keys: bool, only_at: Tensor | None = None, copies: None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:  # fmt: skip
    """`SelfAttention.forward` by `run_packed` of our Triton kernels."""
    import torch

    from megatron_sas.kernels.cpu_linear import linear
    from megatron_sas.model.attention import at_positions

    qkv = linear(x, attention.qkv.weight, attention.qkv.bias)
    qkv = qkv.view(*x.shape[:2], 3, attention.num_heads, -1)  # (B, S, 3, H, D)
    with torch.autocast(x.device.type, enabled=False):
        out, *probabilities = run_packed(qkv, heads, None, attention.dropout_p, qkv.shape[-1] ** -0.5, None)
    return attention.output(at_positions(out.transpose(1, 2).flatten(2), only_at)), *probabilities, None


def _transformers_bert(
    setting: Setting, batch: Batch, sas_weight: float | None
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """With all maps and the regularizer computed from them, or (None) without."""
    from transformers import BertConfig as HFConfig
    from transformers import BertForMaskedLM

    from megatron_sas.model.huggingface import to_hf_config, to_hf_state

    with_maps = sas_weight is not None
    implementation = "eager" if with_maps else "sdpa"
    module = BertForMaskedLM(HFConfig(**to_hf_config(setting.config), attn_implementation=implementation))
    module.load_state_dict(to_hf_state(setting.initial, setting.config), strict=False)

    def loss() -> Tensor:
        output = module(batch.input_ids, labels=batch.full_labels, output_attentions=with_maps)
        if not with_maps:
            return output.loss
        return output.loss + sas_weight / len(batch.input_ids) * paper_sas_term(output.attentions, batch.heads)

    return module, loss


def _training_step(module: nn.Module, loss: Callable[[], Tensor], setting: Setting) -> Callable[[], None]:
    import torch

    module.to(setting.device).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        if setting.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=setting.precision == "bf16"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _deepspeed_step(setting: Setting, batch: Batch) -> Callable[[], None]:
    import torch

    from megatron_sas.data.mlm_dataset import MicroBatch, Window
    from megatron_sas.launch.environment import initialize_distributed
    from megatron_sas.objective.pretraining import MaskedLMWithTerms
    from megatron_sas.objective.sas import SasSection, SasTerm
    from megatron_sas.optim.section import TrainSection
    from megatron_sas.train.step import Engine

    initialize_distributed(timeout_minutes=30)
    sequences = len(batch.input_ids)
    section = TrainSection(
        steps=1,
        global_batch_size=sequences,
        micro_batch_size=sequences,
        precision=setting.precision,
        compile=setting.compiled,
        grad_clip=GRAD_CLIP,
    )
    module = MaskedLMWithTerms(setting.bert(), {"sas": SasTerm(SasSection())})
    engine = Engine(module, section, 0, setting.device)
    names = ("input_ids", "masked_positions", "labels", "heads")
    tensors = {name: getattr(batch, name) for name in names}
    micro_batch = MicroBatch(index=0, sample_ids=torch.arange(sequences), **tensors)
    window = Window(0, [micro_batch], int((batch.labels >= 0).sum()))
    return lambda: engine.update(window, {"sas": SAS_WEIGHT}, measure=False)


def largest_that_fits(fits: Callable[[int], bool]) -> int:
    """The largest number of which `fits` is true, to within a sixteenth; 0 if there is none."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def paper_fits(size: int, setting: Setting, arguments: argparse.Namespace) -> bool:
    """Whether a step of so many sequences in the paper's way finds memory beside what is there."""
    from megatron_sas.core.benchmark import release_memory

    step = None
    try:
        step = build_variant("paper", setting, random_batch(size, arguments, setting.device))
        step()  # the optimizer makes its state
        step()
    except RuntimeError as error:  # besides OutOfMemoryError: libraries without memory, tensors beyond 2³¹ elements
        print(f"paper: {size} sequences do not fit ({first_line(error)})", file=sys.stderr)
        return False
    finally:
        step = None
        release_memory(setting.device)
    return True


@dataclass
class Built:
    """Variants that are ready to be timed: sequences a step, their batches by that number, and the steps."""

    sizes: dict[str, int]
    batches: dict[int, Batch]
    steps: dict[str, Callable[[], None]]
    left_out: dict[str, str]  # name: reason


def build_variants(names: list[str], setting: Setting, arguments: argparse.Namespace) -> Built:
    """All variants; `paper` last, because on a GPU it takes as many sequences as fit beside the others' states."""
    import torch

    from megatron_sas.core.benchmark import release_memory

    cuda = setting.device.type == "cuda"
    built = Built({}, {}, {}, {})
    for name in sorted(names, key=lambda name: name == "paper"):
        size = arguments.batch
        if name == "paper" and arguments.paper_batch is not None:
            size = arguments.paper_batch
        elif name == "paper" and cuda:
            size = largest_that_fits(lambda size: paper_fits(size, setting, arguments))
        if size == 0:
            built.left_out[name] = "not even one sequence fits"
            continue
        batch = built.batches.get(size) or random_batch(size, arguments, setting.device)
        try:
            step = build_variant(name, setting, batch)
            if cuda:
                step()
        except (torch.OutOfMemoryError, ImportError) as error:
            built.left_out[name] = first_line(error)
        if name in built.left_out:
            step = None
            release_memory(setting.device)
            continue
        built.sizes[name], built.batches[size], built.steps[name] = size, batch, step
    return built


def peak_memory(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that one step allocates at most, beyond what was there before.

    None where torch does not count them, or where the step finds no memory.
    """
    import torch

    from megatron_sas.core.benchmark import release_memory

    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        step()
    except torch.OutOfMemoryError:
        release_memory(device)
        return None
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "| variant | batch | ms per step | CPU ms per step | tokens/s | MFU | peak MiB of a step |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["variants"].items():
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"| {name} | {row['batch']} | {1000 * row['seconds']:,.1f} | {1000 * row['cpu_seconds']:,.1f} "
            f"| {row['tokens_per_second']:,.0f} | {mfu} | {peak} |"
        )
    lines += [f"\n{name} is left out: {reason}" for name, reason in result["left_out"].items()]
    lines += ["", "| seconds a token | by the clock | by CPU time |", "|---|---:|---:|"]
    lines += [f"| {n} | {value:.3f} | {result['cpu_ratios'][n]:.3f} |" for n, value in result["ratios"].items()]
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    """The command line, checked.

    Raises:
        InputError: a number that makes no sense, or an output that exists.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SIZES), default="mini", help="named size (mini)")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens per sequence (512)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per step (4)")
    parser.add_argument(
        "--paper-batch", type=int, help="of `paper` (--batch; on GPUs the most that fit, to within a sixteenth)"
    )
    parser.add_argument("--vocab-size", type=int, default=30522, help="entries of the vocabulary (30522)")
    parser.add_argument("--dropout", type=float, default=0.0, help="of attention probabilities (0)")
    parser.add_argument("--pairs", type=int, default=10, help="rounds in which every variant runs once (10)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=(*VARIANTS, *CHANGED),
        help="which to run (ours_max, ours_mlm, paper, hf_sdpa; on GPUs all, ours_flex without dropout only)",
    )
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast (fp32)")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compile our variants or not (on GPUs)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (torch's default)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (0)")
    parser.add_argument("--output", metavar="FILE.json", help="write every time and the ratios here")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    arguments = parser.parse_args()
    for name in ("seq_length", "batch", "paper_batch", "pairs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: must be at least 1")
    if not 0.0 <= arguments.dropout < 1.0:
        raise InputError("--dropout: must be at least 0 and less than 1")
    if arguments.output:
        check_absent(arguments.output, arguments.overwrite)
    return arguments


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every variant's figures and the ratios between them."""
    import torch

    from megatron_sas.core.benchmark import Times, describe_device, median_ratio, time_interleaved
    from megatron_sas.kernels import choose_backend
    from megatron_sas.model.bert import Bert
    from megatron_sas.run.throughput import flops_per_token, peak_flops

    cuda = device.type == "cuda"
    config = BertConfig(
        **SIZES[arguments.model],
        vocab_size=arguments.vocab_size,
        max_position_embeddings=max(arguments.seq_length, 512),
        attention_dropout=arguments.dropout,
    )
    torch.manual_seed(arguments.seed)
    compiled = cuda if arguments.compile is None else arguments.compile
    setting = Setting(config, device, arguments.precision, compiled, Bert(config).state_dict())
    names = arguments.variants
    if names is None:
        names = [n for n in VARIANTS if n != "ours_flex" or arguments.dropout == 0.0] if cuda else list(CPU_VARIANTS)
    built = build_variants(names, setting, arguments)
    sizes = built.sizes
    times = time_interleaved(built.steps, arguments.pairs, device, queue_seconds=QUEUE_SECONDS, left_out=built.left_out)
    per_token = {
        name: Times(*([t / (sizes[name] * arguments.seq_length) for t in kind] for kind in (value.wall, value.cpu)))
        for name, value in times.items()
    }
    flops = flops_per_token(config, arguments.seq_length, MASK_PROB)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    peak = peak_flops(torch.cuda.get_device_name(device), dtype) if cuda else None
    rows = {}
    for name in times:
        rate = 1.0 / statistics.median(per_token[name].wall)
        rows[name] = {
            "batch": sizes[name],
            "seconds": statistics.median(times[name].wall),
            "cpu_seconds": statistics.median(times[name].cpu),
            "tokens_per_second": rate,
            "mfu": None if peak is None else rate * flops / peak,
            "peak_bytes": peak_memory(built.steps[name], device),
            "times": asdict(times[name]),
        }
    pairs = [(a, b) for a, b in RATIOS if {a, b} <= set(times)]
    batch = built.batches.get(arguments.batch) or random_batch(arguments.batch, arguments, device)
    probe = torch.empty(1, 1, arguments.seq_length, config.hidden_size // config.num_heads, device=device, dtype=dtype)
    shared = ("model", "seq_length", "batch", "vocab_size", "dropout", "precision")
    return {
        "device": describe_device(device) | {"transformers": version("transformers")},
        **{name: getattr(arguments, name) for name in shared},
        "compiled": compiled,
        "attention_backend": choose_backend(probe, arguments.dropout),
        "masked_tokens": len(batch.labels),
        "edges": int((batch.heads >= 0).sum()),
        "ratios": {f"{a} / {b}": median_ratio(per_token[a].wall, per_token[b].wall) for a, b in pairs},
        "cpu_ratios": {f"{a} / {b}": median_ratio(per_token[a].cpu, per_token[b].cpu) for a, b in pairs},
        "variants": rows,
        "left_out": built.left_out,
    }


def main() -> None:
    """Measure, print a table, write the JSON."""
    arguments = read_arguments()
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    if device.index:  # DeepSpeed would take the first
        raise InputError(f"--device: {device}: choose the GPU by CUDA_VISIBLE_DEVICES={device.index} instead")
    result = measure(arguments, device)
    print(", ".join(f"{name} {value}" for name, value in result["device"].items()))
    print(f"{arguments.model}, batch {arguments.batch} × {arguments.seq_length}, {arguments.precision}, ", end="")
    print(f"attention dropout {arguments.dropout}, attention {result['attention_backend']}, ", end="")
    print(f"{'' if result['compiled'] else 'not '}compiled, {arguments.pairs} rounds\n\n{table(result)}")
    if arguments.output:
        write_json_atomic(arguments.output, result)


if __name__ == "__main__":
    run_main(main)
