"""BERT with dependency attention."""

from megatron_sas.model.bert import Bert, BertOutput
from megatron_sas.model.config import SIZES, BertConfig

__all__ = ["SIZES", "Bert", "BertConfig", "BertOutput"]
