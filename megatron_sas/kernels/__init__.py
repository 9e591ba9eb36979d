"""Attention that also returns the two probabilities per token that the SAS regularizer reads."""

from megatron_sas.kernels.backends import BACKENDS, choose_backend, unsupported_reason
from megatron_sas.kernels.dependency_attention import dependency_attention, window_bounds
from megatron_sas.kernels.entropy import attention_entropy, attention_statistics, hands_out_entropy, map_statistics

__all__ = [
    "BACKENDS",
    "attention_entropy",
    "attention_statistics",
    "choose_backend",
    "dependency_attention",
    "hands_out_entropy",
    "map_statistics",
    "unsupported_reason",
    "window_bounds",
]
