"""Tokens per second, model FLOPs utilisation and memory of a training run."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator

import psutil
import torch

from megatron_sas.model.config import ModelConfig


def flops_per_token(shape: ModelConfig, seq_length: int, mask_prob: float) -> float:
    """Floating-point operations of one token's forward and backward pass through an encoder.

    A weight matrix costs 2 operations per weight forward and 4 backward. Counted are the four projections and the
    `mlp_matrices` feed-forward matrices of each layer, the products QKᵀ and PV over the full square of the sequence, or
    in layers with a window over what it shows of it, and, on the `mask_prob` masked positions only, the
    transform and the decoder of the LM head. Norms, softmax, embeddings and recomputation are not counted, as is the
    custom for model FLOPs (PaLM, Chowdhery et al. 2022, appendix B).
    """
    hidden = shape.hidden_size
    encoder = 6 * shape.num_layers * (4 * hidden**2 + shape.mlp_matrices * hidden * shape.intermediate_size)
    keys = sum(seen_keys(seq_length, window) for window in shape.windows)
    attention = 3 * 2 * (2 * keys * hidden)
    head = 6 * mask_prob * (hidden**2 + hidden * shape.vocab_size)
    return encoder + attention + head


def seen_keys(seq_length: int, window: tuple[int, int] | None) -> float:
    """Keys that a query sees, on average over the positions; `window` is None or keys before and after its own."""
    if window is None:
        return seq_length
    hidden = sum(max(seq_length - 1 - side, 0) * max(seq_length - side, 0) / 2 for side in window)
    return seq_length - hidden / seq_length


# Dense peaks from NVIDIA's data sheets in operations per second: (pattern of the device name, bf16/fp16 with float32
# accumulation, float32 without TF32). The first match counts, so variants stand before the plain name.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    (r"\bG?B200\b", 2250e12, 75e12),
    (r"\bH200 NVL\b", 835e12, 60e12),
    (r"\bG?H200\b", 989e12, 67e12),
    (r"\bH100 NVL\b", 835e12, 60e12),
    (r"\bH[18]00 PCIe\b", 756e12, 51e12),
    (r"\bH[18]00\b", 989e12, 67e12),
    (r"\bA[18]00\b", 312e12, 19.5e12),
    (r"\bA40\b", 149.7e12, 37.4e12),
    (r"\bA30\b", 165e12, 10.3e12),
    (r"\bA10G\b", 70e12, 35e12),
    (r"\bA10\b", 125e12, 31.2e12),
    (r"\bL40S\b", 362e12, 91.6e12),
    (r"\bL40\b", 181e12, 90.5e12),
    (r"\bL4\b", 121e12, 30.3e12),
    (r"\bRTX 4090\b", 165.2e12, 82.6e12),
    (r"\bRTX 3090\b", 71e12, 35.6e12),
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Dense peak of the device `torch.cuda.get_device_name()` names, in operations per second; None if not known."""
    for pattern, half, single in _PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return {torch.bfloat16: half, torch.float16: half, torch.float32: single}.get(dtype)
    return None


class Throughput:
    """Counts tokens and the seconds spent on them, per logging window and since the start of the run."""

    def __init__(
        self,
        *,
        tokens: int = 0,
        seconds: float = 0.0,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start the clock. `tokens` and `seconds` continue a resumed run; `peak_flops` is that of all devices."""
        self.tokens, self.seconds = tokens, seconds
        self._flops_per_token, self._peak_flops, self._clock = flops_per_token, peak_flops, clock
        self._window_tokens, self._window_seconds = 0, 0.0
        self._since: float | None = clock()

    def add(self, tokens: int) -> None:
        """Count `tokens` of a finished step, over all ranks."""
        self._window_tokens += tokens
        self.tokens += tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block (evaluation, checkpoints) out. Pauses may be nested."""
        if self._since is None:
            yield
            return
        if torch.cuda.is_initialized():  # queued training kernels belong to training
            torch.cuda.synchronize()
        self._stop()
        self._since = None
        try:
            yield
        finally:
            self._since = self._clock()

    def window(self) -> dict[str, float]:
        """`tokens_per_second` since the last call, cumulative `tokens` and `seconds`, and `mfu` (0 to 1).

        `mfu` (model FLOPs utilisation) is left out where the peak is not known. Call it after reading the loss, so that
        the device has finished the steps that were counted.
        """
        self._stop()
        rate = self._window_tokens / self._window_seconds if self._window_seconds > 0 else 0.0
        values = {"tokens_per_second": rate, "tokens": self.tokens, "seconds": self.seconds}
        if self._flops_per_token and self._peak_flops:
            values["mfu"] = rate * self._flops_per_token / self._peak_flops
        self._window_tokens, self._window_seconds = 0, 0.0
        return values

    def _stop(self) -> None:
        """Move the time since the clock was last read into the sums."""
        if self._since is None:
            return
        now = self._clock()
        self._window_seconds += now - self._since
        self.seconds += now - self._since
        self._since = now


def memory() -> dict[str, float]:
    """`memory_gib`: resident memory of this process; with CUDA also `cuda_peak_gib`: the most that tensors held."""
    values = {"memory_gib": psutil.Process().memory_info().rss / 2**30}
    if torch.cuda.is_initialized():
        values["cuda_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return values
