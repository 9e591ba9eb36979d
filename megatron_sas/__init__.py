"""Pretrain BERT-like masked language models while watching and steering Syntactic Attention Structure (SAS)."""

__version__ = "0.1.0"
