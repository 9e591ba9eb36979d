#!/usr/bin/env bash
# transformers 5.23.0: after one short text BigBird computes long ones in another way, until the process ends.
#
# BigBird's sparse attention needs a few blocks of tokens. For a shorter text its encoder takes full attention instead,
# with a warning, and stores that in the model: `set_attention_type("original_full")`. Nothing puts it back. So what a long
# text gives depends on whether a short one came before it: the order of a corpus, or of the requests to a server, is
# part of the result, and a score of a long text cannot be repeated by itself.
#
# Seen on 2026-12-01: the same 400 tokens give other logits after a text of 9 tokens; `attention_type` says original_full.
# Source: transformers/models/big_bird/modeling_big_bird.py, BigBirdModel.forward: `self.set_attention_type`.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install transformers==5.23.0 torch==2.13.0 numpy==2.4.6
run 2> log <<'PY' || { cat log; exit 1; }
import torch
from finding import report
from transformers import BigBirdConfig, BigBirdForMaskedLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
config = BigBirdConfig(**sizes, block_size=8, num_random_blocks=2, max_position_embeddings=512, initializer_range=0.5)
model, long = BigBirdForMaskedLM(config).eval(), torch.randint(5, 64, (1, 400))
with torch.no_grad():
    first, again = model(long).logits, model(long).logits
    model(long[:, :9])
    after = model(long).logits
report(
    "transformers",
    expected="(equal twice in a row, equal after a short text, attention): (True, True, 'block_sparse')",
    seen=(bool(first.equal(again)), bool(torch.allclose(first, after, atol=1e-2)), model.base_model.attention_type),
    stated=(True, False, "original_full"),
)
PY
