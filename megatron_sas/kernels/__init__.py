"""Attention that also returns the two probabilities per token that the SAS regularizer reads."""

from megatron_sas.kernels.dependency_attention import BACKENDS, backend_refusal, choose_backend, dependency_attention

__all__ = ["BACKENDS", "backend_refusal", "choose_backend", "dependency_attention"]
