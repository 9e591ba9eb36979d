#!/usr/bin/env bash
# tokenizers 0.23.3: a BPE without `unk_token` drops unknown characters, and the offsets behind them are wrong.
#
# WordPiece, WordLevel and Unigram refuse a character that they cannot write and have no unknown piece for. One would
# guess that BPE does too, or at least that the pieces which are left still point at their places. It drops the
# character without a word and counts on as if it had never been there: the offsets of all later pieces of the same
# pre-token are too small, so labels or tree edges that are laid on by character land on other pieces. A BPE trained
# with `limit_alphabet` is one step away from this.
#
# Seen on 2026-12-01: "naïve" → n a v e at (0, 1) (1, 2) (2, 3) (2, 3): text[2:3] is "ï" for both "v" and "e".
# Source: tokenizers/src/models/bpe/model.rs, merge_word: a character that is neither in the vocabulary nor has an
# unknown piece adds nothing to the word; word.rs, get_offsets_iter: offsets are sums of the lengths of the symbols that
# are there.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install tokenizers==0.23.3
run <<'PY'
from finding import report
from tokenizers import Tokenizer, models

text = "naïve"
letters = {letter: number for number, letter in enumerate("aenv")}
encoding = Tokenizer(models.BPE(vocab=letters, merges=[])).encode(text)
try:
    Tokenizer(models.WordPiece(vocab=letters)).encode(text)
    wordpiece = "accepted"
except Exception as error:
    wordpiece = str(error)
print("  WordPiece:", wordpiece)
report(
    "tokenizers",
    expected="an error, or [('n', 'n'), ('a', 'a'), ('v', 'v'), ('e', 'e')] as (piece, its place in the text)",
    seen=[(piece, text[start:end]) for piece, (start, end) in zip(encoding.tokens, encoding.offsets)],
    stated=[("n", "n"), ("a", "a"), ("v", "ï"), ("e", "ï")],
)
PY
