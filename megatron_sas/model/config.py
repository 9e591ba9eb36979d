"""The shape of a model: what the configurations of all architectures have in common, and BERT's.

Other architectures have theirs in their own modules. BERT's is here because tools name its sizes in their --help, which
takes no time for torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from megatron_sas.kernels.reference import Window

VOCAB_MULTIPLE = 64
"""The embedding is padded to a multiple of this, which matrix units like; see `ModelConfig.padded_vocab_size`."""

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"num_layers": 2, "hidden_size": 128, "num_heads": 2, "intermediate_size": 512},
    "mini": {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "intermediate_size": 1024},
    "small": {"num_layers": 4, "hidden_size": 512, "num_heads": 8, "intermediate_size": 2048},
    "medium": {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "intermediate_size": 2048},
    "base": {"num_layers": 12, "hidden_size": 768, "num_heads": 12, "intermediate_size": 3072},
    "large": {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096},
}
"""Named sizes: base and large of Devlin et al. (2019), the others of Turc et al. (2019)."""


class Activations(NamedTuple):
    """Numbers a token that a layer's forward keeps for its backward, without what attention keeps for each head."""

    products: int  # inputs of matrix products and what is computed between them, in the products' precision
    norms: int  # inputs of norms: the residual stream, float32 under autocast
    masks: int  # of dropout
    attention: int  # of `products` what attention needs; the last layer keeps only that of tokens that nobody reads


class ModelConfig(ABC):
    """The shape of a model: a subclass is a frozen dataclass that has these fields and its own."""

    architecture: ClassVar[str]
    """Key in `ARCHITECTURES`, and transformers' `model_type`."""
    weights_depend_on: ClassVar[Sequence[str]]
    """The fields that must be equal for two models to compute the same from the same weights."""
    mlp_matrices: ClassVar[int]
    """How many times hidden × intermediate size the feed-forward block of a layer has as weights."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    attention_dropout: float
    pad_token_id: int
    attention_backend: str

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the word embedding: `vocab_size` rounded up to a multiple of `VOCAB_MULTIPLE`."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def head_dim(self) -> int:
        """Dimension of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def windows(self) -> tuple[Window, ...]:
        """Of every layer how many keys before and after its position a query sees; None: all."""
        return (None,) * self.num_layers

    @property
    @abstractmethod
    def activations(self) -> Activations:
        """What one layer keeps of a token, for the estimate of memory."""

    @property
    @abstractmethod
    def embedding_dropout_masks(self) -> int:
        """Numbers a token of the dropout mask of the embeddings; 0 without."""


@dataclass(frozen=True)
class BertConfig(ModelConfig):
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
    initializer_range: float = 0.02
    pad_token_id: int = 0
    attention_backend: str = "auto"

    architecture: ClassVar[str] = "bert"
    mlp_matrices: ClassVar[int] = 2
    weights_depend_on: ClassVar[tuple[str, ...]] = (
        *("num_layers", "hidden_size", "num_heads", "intermediate_size", "vocab_size", "max_position_embeddings"),
        *("type_vocab_size", "layer_norm_eps", "pad_token_id"),
    )

    @property
    def activations(self) -> Activations:
        """Queries, keys, values 3C; attention output C; outputs of both LayerNorms 2C; the inner layer before and after
        GELU 2I. Inputs of both LayerNorms 2C. Two dropout masks."""
        c, masks = self.hidden_size, 2 * self.hidden_size if self.hidden_dropout > 0 else 0
        return Activations(3 * c + c + 2 * c + 2 * self.intermediate_size, 2 * c, masks, attention=4 * c)

    @property
    def embedding_dropout_masks(self) -> int:
        """C, or 0 without dropout."""
        return self.hidden_size if self.hidden_dropout > 0 else 0
