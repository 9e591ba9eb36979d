"""The section `model` of the configuration: what the sections of all architectures have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megatron_sas.core.settings import Section
from megatron_sas.kernels.backends import BACKENDS
from megatron_sas.model.config import ModelConfig

Sizes = dict[str, dict[str, int]]

AttentionBackend = Annotated[Literal["auto", *BACKENDS], Field(description="kernel behind dependency attention")]
InitFrom = Annotated[
    str | None,
    Field(description="Hugging Face directory or checkpoint with the initial weights; default: random ones"),
]

KIND = "kind of encoder; the fields below are those of all kinds"


class ModelSection(Section):
    """The architecture: a named size, and fields that replace its own."""

    SIZES: ClassVar[Sizes]

    architecture: str = Field("bert", description=KIND)
    size: Literal["tiny", "mini", "small", "medium", "base", "large"] = Field("base", description="named size")
    num_layers: int | None = Field(None, description="instead of the size's", ge=1)
    hidden_size: int | None = Field(None, description="instead of the size's", ge=1)
    num_heads: int | None = Field(None, description="instead of the size's", ge=1)
    intermediate_size: int | None = Field(None, description="instead of the size's", ge=1)
    max_position_embeddings: int = Field(512, description="longest sequence the model can take", ge=3)

    def dimensions(self) -> dict[str, int]:
        """Layers, hidden size, heads and intermediate size: the named size's, or what replaces them."""
        return {name: getattr(self, name) or value for name, value in self.SIZES[self.size].items()}

    @abstractmethod
    def shape(self, vocab_size: int, pad_token_id: int) -> ModelConfig:
        """The configuration of the model, for a vocabulary."""

    def faults(self) -> list[str]:
        """The hidden size must divide among the heads."""
        size = self.dimensions()
        if size["hidden_size"] % size["num_heads"]:
            return [f"hidden_size: {size['hidden_size']} is not a multiple of num_heads {size['num_heads']}"]
        return []
