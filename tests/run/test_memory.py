"""The memory formula against what tensors hold in real runs."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from engine_runs import LAUNCHER_VARIABLES

from megatron_sas.data.mlm_dataset import MicroBatch, Window
from megatron_sas.launch.environment import initialize_distributed
from megatron_sas.model.architectures import build_model
from megatron_sas.model.bert import Bert
from megatron_sas.model.config import BertConfig, ModelConfig
from megatron_sas.model.modernbert import ModernBertConfig
from megatron_sas.objective.entropy import EntropySection, EntropyTerm
from megatron_sas.objective.pretraining import MaskedLMWithTerms
from megatron_sas.objective.sas import SasSection, SasTerm
from megatron_sas.optim.section import TrainSection
from megatron_sas.run.memory import (
    MemoryEstimate,
    PeakMemory,
    activation_bytes,
    count_parameters,
    estimate_memory,
    show_bytes,
)
from megatron_sas.train.step import Engine

SEQ_LENGTH = 128
SMALL_BUCKETS = {"reduce_bucket_size": 1_000_000, "allgather_bucket_size": 1_000_000}
# layers, hidden size, vocabulary, micro-batch: the first is mostly weights, the second mostly activations and logits
DEEP, BROAD = (2, 256, 1_000, 3), (2, 64, 4_000, 16)


SAS = {"sas": SasTerm(SasSection())}
ENTROPY = {"entropy": EntropyTerm(EntropySection())}


def shape(layers: int, hidden: int, vocab: int, dropout: float = 0.1) -> BertConfig:
    return BertConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=4,
        intermediate_size=4 * hidden,
        vocab_size=vocab,
        max_position_embeddings=SEQ_LENGTH,
        hidden_dropout=dropout,
        attention_dropout=0.0,
    )


def modern(layers: int, hidden: int, vocab: int, dropout: float) -> ModernBertConfig:
    """With every other layer's attention in a window."""
    return ModernBertConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=4,
        intermediate_size=3 * hidden,
        vocab_size=vocab,
        max_position_embeddings=SEQ_LENGTH,
        global_attn_every_n_layers=2,
        local_attention=32,
        embedding_dropout=dropout,
        mlp_dropout=dropout,
        pad_token_id=0,
    )


def micro_batch(config: ModelConfig, size: int) -> MicroBatch:
    ids = torch.randint(5, config.vocab_size, (size, SEQ_LENGTH))
    positions = torch.arange(0, ids.numel(), 7)
    heads = torch.randint(0, SEQ_LENGTH, ids.shape)
    return MicroBatch(0, torch.arange(size), ids, positions, ids.flatten()[positions], heads)


@pytest.fixture
def device():
    """The device of a run in this process; the environment is left as it was."""
    clean = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    with mock.patch.dict(os.environ, clean, clear=True):
        yield initialize_distributed(30)


@pytest.mark.parametrize("mode", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize("size", [DEEP, BROAD], ids=["deep", "broad"])
@pytest.mark.parametrize(("dropout", "beside"), [(0.0, {}), (0.1, {}), (0.1, ENTROPY)], ids=["0", "0.1", "entropy"])
@pytest.mark.parametrize("kind", [shape, modern])
def test_activations_are_what_autograd_keeps(mode, size, dropout, kind, beside):
    config = kind(*size[:3], dropout)
    module = MaskedLMWithTerms(build_model(config), SAS | beside).train()
    if mode == "bf16":
        module = module.bfloat16()
    batch = micro_batch(config, size[3])
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in module.parameters()}
    casts = {p.shape for p in module.parameters()} | {p.shape[::-1] for p in module.parameters() if p.dim() == 2}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        of_weight = mode == "autocast" and tensor.dtype == torch.bfloat16 and tensor.shape in casts
        if storage.data_ptr() not in weights and not of_weight:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
    ):
        output = module(
            batch.input_ids,
            batch.masked_positions,
            batch.labels,
            batch.heads,
            mlm_scale=1.0,
            term_scales=dict.fromkeys(SAS | beside, 0.1),
        )
    assert output.loss.requires_grad
    expected = activation_bytes(
        config,
        micro_batch_size=size[3],
        seq_length=SEQ_LENGTH,
        masked=len(batch.labels),
        autocast=mode == "autocast",
        compute=2 if mode == "bf16" else 4,
        edge_sets=1,
        second_passes=len(beside),
    )
    assert expected == pytest.approx(sum(kept.values()), rel=0.05)


@pytest.mark.parametrize("size", [DEEP, BROAD], ids=["deep", "broad"])
@pytest.mark.parametrize(
    ("stage", "precision", "accumulation"),
    [(0, "fp32", 1), (0, "bf16", 2), (1, "fp32", 2), (1, "bf16", 2), (2, "fp32", 1), (2, "bf16", 2), (3, "bf16", 2)],
)
def test_the_estimate_is_within_a_fifth_of_an_update(device, tmp_path, size, stage, precision, accumulation):
    json = tmp_path / "buckets.json"
    json.write_text(f'{{"zero_optimization": {str(SMALL_BUCKETS).replace(chr(39), chr(34))}}}')
    config = shape(*size[:3])
    train = TrainSection(
        steps=1,
        global_batch_size=size[3] * accumulation,
        micro_batch_size=size[3],
        precision=precision,
        warmup_steps=0,
        zero_stage=stage,
        deepspeed_config=str(json),
    )
    with PeakMemory(device) as memory:
        engine = Engine(MaskedLMWithTerms(Bert(config), SAS), train, 0, device)
        batches = [micro_batch(config, size[3]) for _ in range(accumulation)]
        engine.update(Window(0, batches, sum(len(b.labels) for b in batches)), {"sas": 0.1}, True)
    estimate = estimate_memory(
        config,
        world_size=1,
        zero_stage=stage,
        precision=precision,
        accumulation=accumulation,
        micro_batch_size=size[3],
        seq_length=SEQ_LENGTH,
        mask_prob=1 / 7,
        zero_optimization=SMALL_BUCKETS,
        cuda=False,
    )
    assert estimate.total == pytest.approx(memory.peak, rel=0.2)


def test_peak_memory_is_exact():
    with PeakMemory(torch.device("cpu")) as memory:
        first = torch.zeros(1 << 20)
        second = torch.zeros(1 << 19)
        del first
        third = torch.zeros(1 << 18)
    assert memory.peak == 4 * ((1 << 20) + (1 << 19))
    assert second.numel() > third.numel()


def test_sharding_divides_what_it_says():
    """BERT-base on 8 GPUs in bf16: 12 bytes per parameter of optimizer state become 1.5."""
    n = count_parameters(BertConfig())
    options = {"world_size": 8, "precision": "bf16", "accumulation": 2, "micro_batch_size": 1, "seq_length": 512}
    zero1, zero2, zero3 = (
        estimate_memory(BertConfig(), zero_stage=stage, mask_prob=0.15, zero_optimization=SMALL_BUCKETS, **options)
        for stage in (1, 2, 3)
    )
    assert zero1.optimizer == zero2.optimizer == zero3.optimizer == 12 * n / 8
    assert (zero1.gradients, zero2.gradients) == (4 * n, 4 * n / 8)
    assert zero1.weights == zero2.weights == 2 * n
    offloaded = {**SMALL_BUCKETS, "offload_optimizer": {"device": "cpu"}}
    assert (
        estimate_memory(
            BertConfig(), zero_stage=3, mask_prob=0.15, zero_optimization=offloaded, cuda=True, **options
        ).optimizer
        == 0
    )


def test_text():
    assert show_bytes(1023) == "1023 bytes"
    assert show_bytes(1536) == "2 KiB"
    assert show_bytes(3 * 2**30) == "3.0 GiB"
    assert str(MemoryEstimate(1024, 0, 0, 0, 1024)).startswith("2 KiB (weights 1 KiB, gradients 0 bytes, ")
