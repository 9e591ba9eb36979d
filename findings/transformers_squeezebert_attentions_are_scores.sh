#!/usr/bin/env bash
# transformers 5.23.0: SqueezeBERT's `output_attentions` are scores, not probabilities.
#
# `attentions` of a model's output are documented as weights after the softmax, and are that for all other encoders that
# were tried (34 classes). SqueezeBERT hands out the scores before it, with the padding's mask added: rows do not
# sum to 1, and padding has -3.4e38. An analysis that takes the largest entry of a row goes on as if nothing were wrong;
# sums over the tokens of a word, averages over heads and entropies are of other numbers than those of other models.
#
# Seen on 2026-12-01: rows of BERT sum to 1.000, those of SqueezeBERT do not, and some entries are negative.
# Source: transformers/models/squeezebert/modeling_squeezebert.py, SqueezeBertSelfAttention.forward:
# `result["attention_score"] = attention_score`, while `attention_probs` is at hand.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install transformers==5.23.0 torch==2.13.0 numpy==2.4.6
run 2> log <<'PY' || { cat log; exit 1; }
import torch
from finding import report
from transformers import BertConfig, BertModel, SqueezeBertConfig, SqueezeBertModel

sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
ids = torch.arange(1, 13)[None]
seen = []
for config, kind in (
    (BertConfig(**sizes, attn_implementation="eager"), BertModel),
    (SqueezeBertConfig(**sizes, embedding_size=32), SqueezeBertModel),
):
    torch.manual_seed(0)
    with torch.no_grad():
        (attention,) = kind(config).eval()(ids, output_attentions=True).attentions
    sums_to_one = bool(torch.allclose(attention.sum(-1), torch.ones(()), atol=1e-3))
    print(f"  {kind.__name__}: rows sum to {attention.sum(-1).min():.3f} … {attention.sum(-1).max():.3f}")
    seen.append((kind.__name__, sums_to_one, bool((attention < 0).any())))
report(
    "transformers",
    expected="(class, rows sum to 1, an entry is negative): True, False for both",
    seen=seen,
    stated=[("BertModel", True, False), ("SqueezeBertModel", False, True)],
)
PY
