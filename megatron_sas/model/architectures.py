"""The architectures that there are. One is a module with the names of `ArchitectureModule`, and a line below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError
from torch import Tensor

from megatron_sas.model import bert, modernbert
from megatron_sas.model.base import MaskedLM
from megatron_sas.model.config import ModelConfig
from megatron_sas.model.section import ModelSection


class ArchitectureModule(Protocol):
    """What the rest of the program needs to know of an architecture."""

    TITLE: str  # in model cards
    SECTION: type[ModelSection]  # `model` of the configuration
    CONFIG: type[ModelConfig]
    MODEL: type[MaskedLM]  # is made from CONFIG, with initial weights
    HF_CLASS: str  # transformers' masked LM that computes the same
    HF_CLASSIFIER: str  # transformers' class for GLUE
    NEW_IN_CLASSIFIER: tuple[str, ...]  # beginnings of the names of weights that it has and the masked LM lacks
    TAKES_TOKEN_TYPES: bool  # whether it is given `token_type_ids`

    def to_hf_state(self, state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """Our state dict as transformers', without padded vocabulary rows and second copies of tied weights."""

    def from_hf_state(self, hf_state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
        """The other way round; raises `InputError` for missing and unknown weights."""

    def to_hf_config(self, config: ModelConfig) -> dict[str, Any]:
        """The fields of transformers' config.json."""

    def from_hf_config(self, values: dict[str, Any], where: str) -> ModelConfig:
        """The other way round; raises `InputError` for what our model does not have. `where` is for messages."""


DEFAULT = "bert"
ARCHITECTURES: dict[str, ArchitectureModule] = {
    "bert": bert,
    "modernbert": modernbert,
}
"""By name, which is transformers' `model_type` where that has only one of them."""


def architecture_of(config: ModelConfig) -> ArchitectureModule:
    """The architecture of a model."""
    return ARCHITECTURES[config.architecture]


def build_model(config: ModelConfig) -> MaskedLM:
    """A model with initial weights from torch's generator."""
    return architecture_of(config).MODEL(config)


def read_section(values: Any, context: Any = None) -> Any:
    """The section `model` from its values, of the class of the architecture that they name; anything else as it is.

    Raises:
        ValidationError: there is no such architecture, or it does not have such fields.
    """
    if not isinstance(values, Mapping):
        return values
    name = values.get("architecture", DEFAULT)
    if not isinstance(name, str) or name not in ARCHITECTURES:
        fault = PydanticCustomError("architecture", f"should be one of {', '.join(ARCHITECTURES)}")
        details = InitErrorDetails(type=fault, loc=("architecture",), input=name)
        raise ValidationError.from_exception_data("model", [details])
    return ARCHITECTURES[name].SECTION.model_validate(values, context=context)
