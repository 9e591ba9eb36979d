"""Masked language models of other architectures, as transformers has them, behind the interface of `Bert`.

They can be evaluated, not trained. Attention maps come from the eager path of their own code, so memory grows with S².
B sequences, S tokens, C hidden size, H attention heads, V vocabulary, M positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from megatron_sas.core.cli import InputError, first_line
from megatron_sas.kernels.reference import entries, valid_heads
from megatron_sas.model.base import AttentionObserver, ModelOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADS_OF_OTHER_TASKS = ("pooler", "seq_relationship", "sop_classifier", "discriminator_predictions", "position_ids")
"""Parts of the names of tensors that a file may hold although no masked LM computes with them."""


@dataclass(frozen=True)
class ForeignConfig:
    """What evaluations and results need to know of a model."""

    architecture: str  # transformers' class
    num_layers: int
    hidden_size: int
    num_heads: int | None  # per layer; None where it gives no maps
    vocab_size: int
    max_position_embeddings: int  # tokens that the model takes


class ForeignModel(nn.Module):
    """A masked LM of transformers that is called as `Bert` is.

    `no_maps` says why the model gives no attention maps, or is None.
    """

    shows_queries = False

    def __init__(self, model: PreTrainedModel) -> None:
        """Wrap a model in evaluation mode, and find out by a short forward pass what it gives."""
        super().__init__()
        self.model = model
        self.no_maps: str | None = None
        self._head_takes_rows = False
        self._attention_type = getattr(model.base_model, "attention_type", None)
        longest = _longest(model)
        layers, num_heads = self._probe(min(longest, 19))
        config = model.config.get_text_config()
        self.config = ForeignConfig(
            type(model).__name__, layers, config.hidden_size, num_heads, config.vocab_size, longest
        )

    def forward(
        self,
        input_ids: Tensor,
        *,
        heads: Tensor | None = None,
        seqlens: Tensor | None = None,
        masked_positions: Tensor | None = None,
        only_at: Tensor | None = None,
        attention_observer: AttentionObserver | None = None,
    ) -> ModelOutput:
        """As `Bert.forward`. `heads` is `(B, S)`.

        Raises:
            InputError: attention is asked for, and the model gives no maps.
        """
        wants_maps = heads is not None or attention_observer is not None
        if wants_maps and self.no_maps:
            raise InputError(f"{self.config.architecture}: {self.no_maps}; leave out what reads attention, UAS too")
        output = self._encode(input_ids, seqlens, wants_maps)
        to_head, to_dependent = [], []
        for layer, maps in enumerate(output.attentions if wants_maps else ()):
            maps = maps.float()  # (B, H, S, S)
            if maps.shape[2:] != (input_ids.shape[1],) * 2:  # which can depend on the length, and was probed for one
                raise InputError(f"{self.config.architecture}: gives no map of tokens by tokens for so long a text")
            if attention_observer is not None:
                attention_observer(layer, maps)
            if heads is not None:
                along = entries(maps, valid_heads(heads, seqlens))
                to_head.append(along[0])
                to_dependent.append(along[1])
        hidden = output[0]  # (B, S, C)
        rows = only_at if masked_positions is None else masked_positions
        if rows is not None:
            hidden = hidden.reshape(-1, hidden.shape[-1])[rows]  # (M, C)
        logits = None if masked_positions is None else self._logits(hidden, masked_positions, input_ids, seqlens)
        return ModelOutput(hidden, logits, tuple(to_head), tuple(to_dependent))

    def _encode(self, input_ids: Tensor, seqlens: Tensor | None, maps: bool) -> Any:
        self._restore_attention()
        return self.model.base_model(input_ids, attention_mask=_mask(input_ids, seqlens), output_attentions=maps)

    def _logits(self, rows: Tensor, positions: Tensor, input_ids: Tensor, seqlens: Tensor | None) -> Tensor:
        """`(M, V)`: the head on these rows `(M, C)` alone, where it can be had, else everywhere."""
        if self._head_takes_rows:
            return self._head(rows)
        self._restore_attention()
        logits = self.model(input_ids, attention_mask=_mask(input_ids, seqlens)).logits
        return logits.reshape(-1, logits.shape[-1])[positions]

    def _head(self, rows: Tensor) -> Tensor:
        """Logits `(M, V)` of hidden states `(M, C)`: the model's own forward, with these instead of an encoder's."""
        with _encoder_returns(self.model.base_model, rows[None]):
            return self.model(torch.zeros(1, len(rows), dtype=torch.int64, device=rows.device)).logits[0]

    def _restore_attention(self) -> None:
        """BigBird takes another kind of attention for a short text, and would keep it for all texts after that."""
        encoder = self.model.base_model
        if getattr(encoder, "attention_type", None) != self._attention_type:
            encoder.set_attention_type(self._attention_type)

    @torch.no_grad()
    def _probe(self, seq: int) -> tuple[int, int | None]:
        """Layers, and heads if there are maps; notes what the model cannot do."""
        input_ids = torch.arange(seq)[None] % self.model.config.get_text_config().vocab_size
        logits = self.model(input_ids).logits
        try:
            rows = torch.arange(0, seq, 2)
            alone = self._head(self._encode(input_ids, None, False)[0][0, rows])
            self._head_takes_rows = torch.allclose(alone, logits[0, rows], rtol=1e-4, atol=1e-4)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            self._head_takes_rows = False  # the class needs more of its encoder than hidden states
        maps = getattr(self._encode(input_ids, None, True), "attentions", None) or ()
        num_heads = maps[0].shape[1] if maps and maps[0] is not None else 0
        for layer in maps:
            if layer is None or layer.shape != (1, num_heads, seq, seq):
                self.no_maps = "its attention is not a map of tokens by tokens"
            elif (layer < 0).any() or not torch.allclose(layer.sum(-1), torch.ones(()), atol=1e-3):
                self.no_maps = "what it returns as attention are no probabilities"
        if not maps:
            self.no_maps = "its class returns no attention maps"
        layers = len(maps) or self.model.config.get_text_config().num_hidden_layers
        return layers, None if self.no_maps else num_heads


def load_foreign(path: Path) -> ForeignModel:
    """Load a Hugging Face directory, float32 on the CPU, into transformers' own class; no code of the directory is run.

    Raises:
        InputError: no masked LM, an encoder-decoder, a class that is not in transformers, weights that are missing or
            left over.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of many kinds
        raise InputError(f"{path}/config.json: transformers cannot read it ({first_line(error)})") from None
    kind = f"{path}/config.json: model_type {config.model_type!r}"
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        raise InputError(f"{kind} has no masked LM in transformers; give an encoder that was trained as one")
    if config.is_encoder_decoder or getattr(config, "is_decoder", False):
        raise InputError(f"{kind} is a decoder or has one; give an encoder")
    try:
        with _without_progress_bar():
            model, info = AutoModelForMaskedLM.from_pretrained(
                path,
                config=config,
                trust_remote_code=False,
                local_files_only=True,
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:
        raise InputError(f"{path}: transformers cannot load it ({first_line(error)})") from None
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{path}: has no weights for {missing[0]}, so it is no masked LM; give one with its head")
    others = [name for name in info["unexpected_keys"] if not any(part in name for part in HEADS_OF_OTHER_TASKS)]
    if others:
        raise InputError(
            f"{path}: {sorted(others)[0]} is no part of a {type(model).__name__}; give the files as they were saved"
        )
    try:
        return ForeignModel(model.eval())
    except Exception as error:  # of any kind: its code is transformers', and wants more than tokens
        raise InputError(f"{path}: a {type(model).__name__} cannot be measured ({first_line(error)})") from None


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """A trajectory loads many models, and has a bar of its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _mask(input_ids: Tensor, seqlens: Tensor | None) -> Tensor:
    """int64 `(B, S)`: 1 for tokens, 0 for padding."""
    if seqlens is None:
        return torch.ones_like(input_ids)
    return (torch.arange(input_ids.shape[1], device=input_ids.device) < seqlens[:, None]).long()


def _longest(model: PreTrainedModel) -> int:
    """Tokens that the model takes. Those of RoBERTa's family count positions from behind the padding's id."""
    config = model.config.get_text_config()
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return len(module.weight) - module.padding_idx - 1
    return config.max_position_embeddings


@contextmanager
def _encoder_returns(encoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Within, the encoder answers every call by `hidden` `(1, M, C)`."""
    from transformers.modeling_outputs import BaseModelOutput

    encoder.forward = lambda *arguments, **options: BaseModelOutput(last_hidden_state=hidden)
    try:
        yield
    finally:
        del encoder.forward
