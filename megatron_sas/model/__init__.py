"""BERT with dependency attention, and its exchange with Hugging Face."""

from megatron_sas.model.bert import Bert, BertOutput
from megatron_sas.model.config import SIZES, BertConfig
from megatron_sas.run.reading import load_model

__all__ = ["SIZES", "Bert", "BertConfig", "BertOutput", "load_model"]
