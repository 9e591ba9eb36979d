"""The shape of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from megatron_sas.core.settings import Section
from megatron_sas.kernels.backends import BACKENDS

VOCAB_MULTIPLE = 64
"""The embedding is padded to a multiple of this, which matrix units like; see `BertConfig.padded_vocab_size`."""

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 2, "hidden_size": 128, "num_heads": 2, "intermediate_size": 512},
    "mini": {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "intermediate_size": 1024},
    "small": {"num_layers": 4, "hidden_size": 512, "num_heads": 8, "intermediate_size": 2048},
    "medium": {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "intermediate_size": 2048},
    "base": {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072},
    "large": {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096},
}
"""Named sizes: base and large of Devlin et al. (2019), the others of Turc et al. (2019)."""


class ModelSection(Section):
    """The architecture: a named size, and fields that replace its own."""

    size: Literal["tiny", "mini", "small", "medium", "base", "large"] = Field("base", description="named size")
    num_layers: int | None = Field(None, description="instead of the size's", ge=1)
    hidden_size: int | None = Field(None, description="instead of the size's", ge=1)
    num_heads: int | None = Field(None, description="instead of the size's", ge=1)
    intermediate_size: int | None = Field(None, description="instead of the size's", ge=1)
    max_position_embeddings: int = Field(512, description="longest sequence the model can take", ge=3)
    norm_placement: Literal["post", "pre"] = Field("post", description="LayerNorm after (BERT) or before each block")
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


@dataclass(frozen=True)
class BertConfig:
    """Architecture of a BERT masked language model. The defaults are BERT-base uncased."""

    num_layers: int = 12
    hidden_size: int = 768
    num_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    norm_placement: str = "post"
    initializer_range: float = 0.02
    pad_token_id: int = 0
    attention_backend: str = "auto"

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding: `vocab_size` rounded up to a multiple of `VOCAB_MULTIPLE`."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def head_dim(self) -> int:
        """Dimension of one attention head."""
        return self.hidden_size // self.num_heads
