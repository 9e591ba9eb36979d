"""The section `model` of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_sas.core.settings import Section
from megatron_sas.kernels.backends import BACKENDS
from megatron_sas.model.config import SIZES


class ModelSection(Section):
    """The architecture: a named size, and fields that replace its own."""

    size: Literal["tiny", "mini", "small", "medium", "base", "large"] = Field("base", description="named size")
    num_layers: int | None = Field(None, description="instead of the size's", ge=1)
    hidden_size: int | None = Field(None, description="instead of the size's", ge=1)
    num_heads: int | None = Field(None, description="instead of the size's", ge=1)
    intermediate_size: int | None = Field(None, description="instead of the size's", ge=1)
    max_position_embeddings: int = Field(512, description="longest sequence the model can take", ge=3)
    hidden_dropout: float = Field(0.1, description="dropout of embeddings and block outputs", ge=0, lt=1)
    attention_dropout: float = Field(0.1, description="dropout of attention probabilities; use 0 on CPU", ge=0, lt=1)
    attention_backend: Literal["auto", *BACKENDS] = Field("auto", description="kernel behind dependency attention")
    init_from: str | None = Field(
        None, description="Hugging Face directory or checkpoint with the initial weights; default: random ones"
    )

    def dimensions(self) -> dict[str, int]:
        """Layers, hidden size, heads and intermediate size: the named size's, or what replaces them."""
        return {name: getattr(self, name) or value for name, value in SIZES[self.size].items()}

    def faults(self) -> list[str]:
        """The hidden size must divide among the heads."""
        size = self.dimensions()
        if size["hidden_size"] % size["num_heads"]:
            return [f"hidden_size: {size['hidden_size']} is not a multiple of num_heads {size['num_heads']}"]
        return []
