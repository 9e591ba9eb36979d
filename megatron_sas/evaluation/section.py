"""The section `evaluation` of the configuration: when, and the settings of every evaluation."""

from __future__ import annotations

from pydantic import Field

from megatron_sas.core.settings import When
from megatron_sas.evaluation.registry import own_input_first


class EvaluationSection(*(evaluation.settings for evaluation in reversed(own_input_first())), When):
    """When and on what the model is evaluated while it trains."""

    batch_tokens: int = Field(16_384, description="tokens per evaluation forward", ge=1)
