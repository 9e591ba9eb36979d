"""How much memory training needs on one device, from the configuration alone.

n parameters, W processes, C hidden size, I intermediate size, V padded vocabulary. Counted are tensors; the CUDA
context, NCCL's buffers and fragmentation come on top (1 to 2 GiB on a GPU). `attention_backend: reference` keeps whole
attention maps and is not covered.
"""

from __future__ import annotations

import functools
import gc
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_sas.model.architectures import build_model
from megatron_sas.model.config import ModelConfig
from megatron_sas.optim.optimizers import OPTIMIZERS, moments_of

FP32, BF16 = 4, 2

# DeepSpeed's defaults (elements), where its JSON says nothing.
REDUCE_BUCKET = 500_000_000
MAX_LIVE_PARAMETERS = 1_000_000_000
PREFETCH_BUCKET = 50_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device while a step is at its peak."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float  # what DeepSpeed packs gradients into to reduce them
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {show_bytes(getattr(self, field.name))}" for field in fields(self))
        return f"{show_bytes(self.total)} ({parts})"


def show_bytes(count: float) -> str:
    """`count` bytes, human-readable, in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


@functools.cache
def count_parameters(config: ModelConfig) -> int:
    """Parameters of a model of this shape, without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config).parameters())


@functools.cache
def optimizer_bytes(config: ModelConfig, optimizer: str) -> int:
    """What an optimizer keeps of all parameters of a model of this shape, without allocating it."""
    with torch.device("meta"):
        named = list(build_model(config).named_parameters())
    kept = (moment for name, p in named for moment in moments_of(OPTIMIZERS[optimizer], name, p).values())
    return sum(moment.nbytes for moment in kept)


def estimate_memory(
    config: ModelConfig,
    *,
    world_size: int,
    zero_stage: int,
    precision: str,
    accumulation: int,
    micro_batch_size: int,
    seq_length: int,
    mask_prob: float,
    edge_sets: int = 1,
    second_passes: int = 0,
    optimizer: str = "adamw",
    zero_optimization: dict[str, Any] | None = None,
    cuda: bool = True,
) -> MemoryEstimate:
    """The peak of one step: where the forward of a micro-batch ends and its backward begins.

    Args:
        accumulation: micro-batches per update; with more than one, gradients exist while activations peak.
        edge_sets: sets of edges along which probabilities are computed, one for each term that asks for some.
        second_passes: terms that compute attention a second time, as its entropy does.
        optimizer: by name in `OPTIMIZERS`.
        zero_optimization: that section of DeepSpeed's JSON (bucket sizes, offloading).
        cuda: there a compiled step keeps the gradient of the logits beside them, and offloading moves memory.
    """
    zero, n, bf16 = zero_optimization or {}, count_parameters(config), precision == "bf16"
    compute = BF16 if bf16 and zero_stage > 0 else FP32
    # The optimizer's moments; under ZeRO also a float32 copy of the weights that it updates.
    kept = float(optimizer_bytes(config, optimizer))
    state = kept if zero_stage == 0 else (kept + 4.0 * n) / world_size
    weights, buffers = float(compute * n), 0.0
    whole_accumulators = zero_stage == 1 and bf16  # DeepSpeed's BF16_Optimizer makes them once, in full float32
    gradients = 4.0 * n if accumulation > 1 or zero_stage == 3 or whole_accumulators else 0.0
    if zero_stage >= 2:
        gradients /= world_size
    if zero_stage == 0 and bf16:
        weights += BF16 * n  # what autocast makes for the matrix products and keeps for their backward
    if zero_stage == 3:
        weights = compute * n / world_size
        if world_size > 1:  # gathered ones, and those being gathered
            live = min(n, float(zero.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS)))
            weights += compute * (live + min(n, float(zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET))))
    if zero_stage > 0 and not whole_accumulators:
        overlap = zero.get("overlap_comm", zero_stage == 3) and zero_stage < 3
        buffers = compute * float(zero.get("reduce_bucket_size", REDUCE_BUCKET)) * (2 if overlap else 1)
    if _on_host(zero.get("offload_optimizer")) and cuda:
        state = gradients = 0.0
    if _on_host(zero.get("offload_param")) and cuda:
        weights -= compute * n / world_size
    masked = round(micro_batch_size * seq_length * mask_prob)
    activations = activation_bytes(
        config,
        micro_batch_size=micro_batch_size,
        seq_length=seq_length,
        masked=masked,
        autocast=bf16 and zero_stage == 0,
        compute=compute,
        edge_sets=edge_sets,
        second_passes=second_passes,
    )
    # The gradient of the logits: in compiled code next to them, else in their place.
    head = (BF16 if bf16 else FP32) * masked * config.padded_vocab_size if cuda else 0
    return MemoryEstimate(weights, gradients, state, buffers, activations + head)


def activation_bytes(
    config: ModelConfig,
    *,
    micro_batch_size: int,
    seq_length: int,
    masked: int,
    autocast: bool,
    compute: int,
    edge_sets: int,
    second_passes: int,
) -> float:
    """Bytes that one forward keeps for its backward, without the weights (and autocast's copies of them).

    Per token and layer: what the architecture says (`ModelConfig.activations`), masks of 1 byte, and a few float32
    numbers per head. The last layer keeps most of it at the masked positions only, and these rows of attention's output
    once more.
    Under autocast the residual stream and so the LayerNorms' inputs stay float32, and their outputs are kept as bf16.
    `compute`: bytes of a weight.
    """
    c, heads, vocab = config.hidden_size, config.num_heads, config.padded_vocab_size
    inner = BF16 if autocast else compute  # of matrix products
    norm_input = FP32 if autocast else compute
    kept = config.activations
    # The rest of a layer, with mean and deviation of the LayerNorms.
    outside = inner * (kept.products - kept.attention) + norm_input * kept.norms + kept.masks + 4 * FP32
    attention = inner * kept.attention + FP32 * heads  # logsumexp
    attention += edge_sets * (2 * FP32 * heads + 8)  # the two probabilities, int64 heads
    # Of a second pass: its output, queries in float32, logsumexp and entropy.
    attention += second_passes * (inner * c + (FP32 * c if inner == BF16 else 0) + 2 * FP32 * heads)
    embeddings = 2 * norm_input * c + config.embedding_dropout_masks + 16
    at_all = config.num_layers * attention + (config.num_layers - 1) * outside + embeddings
    at_masked = outside + inner * c + inner * (3 * c + vocab)  # of the last layer; of the head
    return micro_batch_size * seq_length * at_all + masked * at_masked


def _on_host(section: Any) -> bool:
    return isinstance(section, dict) and section.get("device") == "cpu"


class PeakMemory:
    """`peak`: the most bytes that tensors made in the block held at once on the device.

    On a GPU that is CUDA's own count; on a CPU torch's profiler records every allocation.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak = 0
        self._cuda = device.type == "cuda"
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> PeakMemory:
        gc.collect()  # what is garbage now must not be freed within the block
        if self._cuda:
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            self._profiler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._cuda:
            self.peak = torch.cuda.max_memory_allocated() - self._before
            return
        self._profiler.__exit__(*error)
        events, allocations = list(self._profiler.profiler.kineto_results.experimental_event_tree()), []
        for event in events:  # which grows
            events += event.children
            if event.tag.name == "Allocation":
                found = event.extra_fields
                allocations.append((event.start_time_ns, found.total_allocated, found.alloc_size))
        if allocations:
            _, total, size = min(allocations)
            self.peak = max(total for _, total, _ in allocations) - (total - size)
