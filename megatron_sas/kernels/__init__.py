"""Attention that also returns the two probabilities per token that the SAS regularizer reads."""

from megatron_sas.kernels.dependency_attention import BACKENDS, backend_refusal, choose_backend, dependency_attention
from megatron_sas.kernels.entropy import attention_statistics

__all__ = ["BACKENDS", "attention_statistics", "backend_refusal", "choose_backend", "dependency_attention"]
