"""Everything that is measured on each model of a trajectory, in one pass over each input."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from megatron_sas.core.cli import InputError
from megatron_sas.data.tokenizer import tokenizer_digest, tokenizer_hash
from megatron_sas.evaluation.base import TEXT, Resources
from megatron_sas.evaluation.complexity import WEIGHT_NORM, weight_norm
from megatron_sas.evaluation.items import Items
from megatron_sas.evaluation.live import EvaluationSection, prepare
from megatron_sas.evaluation.registry import EVALUATIONS
from megatron_sas.evaluation.text import open_packed_text
from megatron_sas.evaluation.uas import UasEvaluation
from megatron_sas.run.reading import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_sas.model.base import MaskedLM
    from megatron_sas.model.config import ModelConfig

MASK_PROB = 0.15


class Inputs(EvaluationSection):
    """What to measure on: what training evaluates on, by the same settings, and a text, each if it is given."""

    text: str | None = None  # prefix of packed data
    precision: str = "fp32"

    @classmethod
    def of(cls, *, text_sequences: int = 1000, batch_tokens: int = 4096, **settings: Any) -> Inputs:
        """From fields; of the text the first `text_sequences` count.

        Raises:
            InputError: a field has a wrong value.
        """
        sizes = {"validation_sequences": text_sequences, "complexity_sequences": text_sequences}
        try:
            return cls(batch_tokens=batch_tokens, **sizes, **settings)
        except ValidationError as error:
            fault = error.errors()[0]
            raise InputError(f"{fault['loc'][0]}: {fault['msg'].lower()}, not {fault['input']!r}") from None


class TrajectoryTask:
    """All inputs, prepared for models of one tokenizer and shape: edges and pairs are the same for all of them.

    Raises:
        InputError: an input is wrong or does not fit such models.
    """

    def __init__(self, inputs: Inputs, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.inputs = inputs
        self.shape, self.digest = _shape(config, tokenizer), tokenizer_digest(tokenizer)
        longest = config.max_position_embeddings
        self.text = None if inputs.text is None else open_packed_text(inputs.text, tokenizer, longest)
        alone = not UasEvaluation.wanted(inputs)
        resources = Resources(tokenizer, self.text, longest, MASK_PROB, text_gives_attention=alone)
        self.evaluations = prepare(inputs, resources)

    def settings(self) -> dict[str, Any]:
        """What decides the measurements, as JSON values; checksums rather than paths identify inputs."""
        sources: dict[str, Any] = {e.input: None for e in EVALUATIONS.values()}
        sources |= {e.input: e.source() for e in self.evaluations.values() if e.input != TEXT}
        if self.text is not None:
            sources[TEXT] = {
                "prefix": str(Path(self.inputs.text).resolve()),
                "fingerprint": self.text.fingerprint,
                "sequences": min(self.inputs.validation_sequences, self.text.num_sequences),
                "mask_prob": MASK_PROB,
            }
        return {**sources, "model": self.shape, "precision": self.inputs.precision}

    def notes(self) -> list[str]:
        """Lines for the user about the inputs."""
        return [f"{getattr(self.inputs, e.input)}: {n}" for e in self.evaluations.values() for n in e.notes()]

    def load(self, path: Path, device: torch.device) -> MaskedLM:
        """A model of the trajectory. Raises `InputError` when it cannot be read or is of another kind."""
        model, tokenizer = load_model(path, device)
        shape = _shape(model.config, tokenizer)
        different = sorted(name for name in shape if shape[name] != self.shape[name])
        if not different and tokenizer_digest(tokenizer) != self.digest:
            different = ["what the tokenizer does"]
        if different:
            raise InputError(f"{path}: differs from the other models in {', '.join(different)}; measure it elsewhere")
        return model

    def measure(self, model: MaskedLM) -> tuple[dict[str, Any], dict[str, Items]]:
        """The numbers of point.json (but `step` and `model`), and the items by evaluation."""
        started = time.perf_counter()
        values: dict[str, Any] = {WEIGHT_NORM.key: weight_norm(model)}
        items: dict[str, Items] = {}
        device = next(model.parameters()).device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.inputs.precision == "bf16"):
            for name, evaluation in self.evaluations.items():
                numbers, single = evaluation.measure(model)
                values |= numbers
                if single is not None:
                    items[name] = single
        return values | {"seconds": time.perf_counter() - started}, items


def kind_of(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The same for all models that one task can measure, as text."""
    return json.dumps([_shape(config, tokenizer), tokenizer_digest(tokenizer)])


def _shape(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What all models of a trajectory have in common."""
    names = ("num_layers", "num_heads", "max_position_embeddings")
    return {"tokenizer": tokenizer_hash(tokenizer), **{name: getattr(config, name) for name in names}}
