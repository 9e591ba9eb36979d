"""A small random BERT with the real vocabulary: Hugging Face's own eager model, also behind the interface of ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bert_pairs import tiny_hf_bert
from torch import nn
from transformers import BertForMaskedLM, BertTokenizerFast


class HuggingFaceAdapter(nn.Module):
    """`transformers.BertForMaskedLM` with the call of `megatron_sas.model.Bert`: an independent model to evaluate."""

    takes_copies = False

    def __init__(self, model: BertForMaskedLM):
        super().__init__()
        self.model = model
        self.forwards = 0

    def forward(self, input_ids, *, seqlens=None, masked_positions=None, attention_observer=None):
        self.forwards += 1
        mask = torch.ones_like(input_ids)
        if seqlens is not None:
            mask = (torch.arange(input_ids.shape[1]) < seqlens[:, None]).long()
        out = self.model.bert(input_ids, attention_mask=mask, output_attentions=attention_observer is not None)
        for layer, probs in enumerate(out.attentions or ()):
            attention_observer(layer, probs)
        if masked_positions is None:
            return SimpleNamespace(logits=None)
        return SimpleNamespace(logits=self.model.cls(out.last_hidden_state.flatten(0, 1)[masked_positions]))


@pytest.fixture(scope="session")
def tokenizer(data_dir):
    return BertTokenizerFast(vocab=str(data_dir / "bert_vocab" / "vocab.txt"))


@pytest.fixture(scope="session")
def hf_model(tokenizer):
    """Large initial weights: attention is peaked, and scores differ between sentences."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 160}
    return tiny_hf_bert(len(tokenizer), initializer_range=0.2, attn_implementation="eager", **sizes).eval()


@pytest.fixture
def adapter(hf_model):
    return HuggingFaceAdapter(hf_model).eval()


@pytest.fixture(scope="session")
def model_directory(hf_model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    hf_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
