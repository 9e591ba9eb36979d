"""FLOPs against figures in the literature and torch's own counter, the clock against a hand-made one."""

import os
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sas.kernels.reference import in_window
from megatron_sas.model.config import BertConfig
from megatron_sas.model.modernbert import ModernBertConfig
from megatron_sas.run.throughput import Throughput, flops_per_token, memory, peak_flops, seen_keys


def test_bert_base_figures():
    giga = 1e-9
    total = flops_per_token(BertConfig(), 512, 0.15) * giga
    encoder_and_attention = flops_per_token(BertConfig(), 512, 0) * giga
    encoder = flops_per_token(BertConfig(), 0, 0) * giga
    assert encoder == pytest.approx(0.510, abs=5e-4)
    assert encoder_and_attention - encoder == pytest.approx(0.057, abs=5e-4)
    assert total - encoder_and_attention == pytest.approx(0.022, abs=5e-4)
    assert total == pytest.approx(0.588, abs=5e-4)
    assert 0.4 * 989e12 * giga / total == pytest.approx(673e3, rel=1e-3)


@pytest.mark.parametrize("window", [(0, 0), (3, 3), (2, 7), (40, 40), (0, 9)])
@pytest.mark.parametrize("seq", [1, 8, 21])
def test_keys_in_a_window_are_counted(window, seq):
    places = torch.arange(seq)
    assert seen_keys(seq, window) * seq == pytest.approx(
        float(in_window(places[:, None], places, window).sum()), rel=1e-12
    )
    assert seen_keys(seq, None) == seq


def test_a_gated_block_and_windows_count():
    """Layers of ModernBERT-base at S = 1024: three matrices in the feed-forward block, two of three layers local."""
    total = flops_per_token(ModernBertConfig(num_layers=3), 1024, 0)
    keys = 1024 + 2 * seen_keys(1024, (64, 64))
    assert total == pytest.approx(6 * 3 * (4 * 768**2 + 3 * 768 * 1152) + 12 * keys * 768)
    assert seen_keys(1024, (64, 64)) == pytest.approx(129, rel=0.04)


@pytest.mark.parametrize("layers, width, inner, vocab, length", [(1, 16, 32, 50, 8), (3, 32, 128, 101, 20)])
def test_equals_the_operations_that_torch_counts(layers, width, inner, vocab, length):
    """A bare BERT in matrix products, with every position masked so that the head runs on all."""
    tokens = torch.randn(length, width, requires_grad=True)
    square = [[torch.randn(width, width, requires_grad=True) for _ in range(4)] for _ in range(layers)]
    wide = [(torch.randn(width, inner, requires_grad=True), torch.randn(inner, width, requires_grad=True))] * layers
    transform, decoder = (torch.randn(width, size, requires_grad=True) for size in (width, vocab))
    with FlopCounterMode(display=False) as counter:
        x = tokens
        for (wq, wk, wv, wo), (up, down) in zip(square, wide, strict=True):
            attention = torch.softmax((x @ wq) @ (x @ wk).T, dim=-1) @ (x @ wv)
            x = torch.tanh((attention @ wo) @ up) @ down
        ((x @ transform) @ decoder).sum().backward()
    expected = counter.get_total_flops() / length
    shape = BertConfig(num_layers=layers, hidden_size=width, intermediate_size=inner, vocab_size=vocab)
    assert flops_per_token(shape, length, mask_prob=1) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    "name, dtype, expected",
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, 67e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H100 NVL", torch.bfloat16, 835e12),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.float16, 312e12),
        ("NVIDIA A10G", torch.bfloat16, 70e12),
        ("NVIDIA A10", torch.bfloat16, 125e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2e12),
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
        ("Some Card 9000", torch.bfloat16, None),
        ("cpu", torch.float32, None),
    ],
)
def test_peaks(name, dtype, expected):
    assert peak_flops(name, dtype) == expected


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_windows_and_pauses():
    clock = Clock()
    meter = Throughput(tokens=1000, seconds=50.0, flops_per_token=2.0, peak_flops=1000.0, clock=clock)
    for _ in range(4):
        clock.now += 1
        meter.add(100)
    with meter.paused():
        clock.now += 33
        with meter.paused():
            clock.now += 33
    clock.now += 1
    assert meter.window() == {"tokens_per_second": 80.0, "tokens": 1400, "seconds": 55.0, "mfu": 0.16}
    with pytest.raises(RuntimeError), meter.paused():
        clock.now += 7
        raise RuntimeError
    clock.now += 2
    meter.add(10)
    with meter.paused():
        assert meter.window()["tokens_per_second"] == 5.0
    assert meter.window() == {"tokens_per_second": 0.0, "tokens": 1410, "seconds": 57.0, "mfu": 0.0}


def test_mfu_needs_a_known_peak():
    assert "mfu" not in Throughput(flops_per_token=2.0, peak_flops=None).window()


def test_memory():
    """Against the kernel's own count; a second reading may differ by what other threads allocate in between."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert memory()["memory_gib"] == pytest.approx(resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**30, rel=0.05)
