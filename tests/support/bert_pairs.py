"""Small random models: ours and transformers' with the same weights, and transformers' own."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, BertForMaskedLM, PreTrainedModel
from transformers import BertConfig as HFConfig
from transformers.initialization import no_init_weights

from megatron_sas.model.architectures import architecture_of, build_model
from megatron_sas.model.base import MaskedLM
from megatron_sas.model.config import BertConfig, ModelConfig
from megatron_sas.model.huggingface import from_hf_state, to_hf_config, to_hf_state
from megatron_sas.model.modernbert import ModernBertConfig

SMALL = BertConfig(
    num_layers=3,
    hidden_size=48,
    num_heads=4,
    intermediate_size=96,
    vocab_size=101,
    max_position_embeddings=64,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
SMALL_MODERN = ModernBertConfig(
    num_layers=4,
    hidden_size=48,
    num_heads=4,
    intermediate_size=40,
    vocab_size=101,
    max_position_embeddings=64,
    local_attention=11,
    pad_token_id=0,
)


def perturbed_bert(config: ModelConfig, seed: int = 0) -> MaskedLM:
    """A model none of whose parameters has its initial value, with large enough weights for uneven attention."""
    torch.manual_seed(seed)
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += torch.randn_like(parameter) * (0.3 if "qkv.weight" in name else 0.1)
        model.embeddings.word.weight[config.vocab_size :] = 0
        model.head.bias[config.vocab_size :] = 0
    return model


def hf_twin(model: MaskedLM, attention: str = "eager") -> PreTrainedModel:
    """transformers' model with the weights of ours."""
    return hf_model(model.state_dict(), model.config, attention)


def hf_model(state: dict[str, Tensor], config: ModelConfig, attention: str = "eager") -> PreTrainedModel:
    """transformers' model with the weights `state` of ours."""
    fields = AutoConfig.for_model(**to_hf_config(config), attn_implementation=attention)
    with no_init_weights():  # for the size of a real model it takes seconds
        twin = getattr(transformers, architecture_of(config).HF_CLASS)(fields)
    missing, unexpected = twin.load_state_dict(to_hf_state(state, config), strict=False)
    assert not unexpected
    assert set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "decoder.weight"}
    twin.tie_weights()
    return twin


def tiny_hf_bert(vocab_size: int, *, seed: int = 0, **fields: object) -> BertForMaskedLM:
    """A model that transformers made, with random weights; `fields` of its configuration replace the sizes here."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(seed)
    return BertForMaskedLM(HFConfig(vocab_size=vocab_size, **{**sizes, **fields}))


def hf_gradients(twin: PreTrainedModel, model: MaskedLM) -> dict[str, Tensor]:
    """The twin's gradients under our names: query, key and value joined, vocabulary padded with zeros."""
    return from_hf_state({name: parameter.grad for name, parameter in twin.named_parameters()}, model.config)


def random_ids(config: ModelConfig, batch: int, seq: int, seed: int = 0) -> Tensor:
    """int64 `(B, S)` without the padding id."""
    return torch.randint(1, config.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(seed))
