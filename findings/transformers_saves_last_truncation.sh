#!/usr/bin/env bash
# transformers 5.23.0: `save_pretrained` writes the truncation and padding of the last call into tokenizer.json.
#
# `truncation=True, max_length=5` is an argument of one call. One would guess that it is gone afterwards, as it is for
# the next call. But it stays as the state of the inner tokenizer, and saving the tokenizer writes it into
# tokenizer.json. transformers resets it with each call; `tokenizers.Tokenizer.from_file`, and other programs that
# follow the file, cut every text at 5 pieces, silently.
#
# Seen on 2026-12-01: 9 pieces before, [CLS] the dog runs [SEP] after.
# Source: transformers/tokenization_utils_tokenizers.py, set_truncation_and_padding (changes `self._tokenizer`) and
# save_pretrained, which saves that object.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install transformers==5.23.0 tokenizers==0.23.3
run 2> log <<'PY' || { cat log; exit 1; }
from finding import report
from tokenizers import Tokenizer
from transformers import BertTokenizer

words = "[PAD] [UNK] [CLS] [SEP] [MASK] the dog runs and cat sleeps".split()
text = "the dog runs and the cat sleeps"
tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
tokenizer.save_pretrained("before")
tokenizer(text, truncation=True, max_length=5)  # say, one evaluation on short sequences
tokenizer.save_pretrained("after")
before, after = (Tokenizer.from_file(f"{name}/tokenizer.json").encode(text).tokens for name in ("before", "after"))
report(
    "transformers tokenizers",
    expected="two files that cut alike: 9 and 9 pieces",
    seen=f"{len(before)} and {len(after)} pieces: {' '.join(after)}",
    stated="9 and 5 pieces: [CLS] the dog runs [SEP]",
)
PY
