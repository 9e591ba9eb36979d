#!/usr/bin/env bash
# transformers 5.23.0: RoBERTa's tokenizer glues words that are given one by one.
#
# `tokenizer(words, is_split_into_words=True)` is how words with labels (parts of speech, names, heads of dependencies)
# are cut into tokens. RoBERTa's tokens include the space before a word, so without `add_prefix_space=True` there is no
# space to include. transformers 4 refuses that and names the remedy; the docstring of transformers 5 still names it. But
# the check is gone: the call returns the tokens of "thedogsran", cut at the words, and `word_ids()` looks right.
#
# Seen on 2026-12-01: 4.57.6 raises an AssertionError; 5.23.0 returns ['the', 'do', 'gs', 'ran'], where the text "the dogs
# ran" is ['the', 'Ġdogs', 'Ġran'].
# Source: transformers 4.57.6, models/roberta/tokenization_roberta_fast.py, _batch_encode_plus, has the check; in 5.23.0,
# models/roberta/tokenization_roberta.py, only the docstring has it.
set -euo pipefail
source "$(dirname "$0")/common.sh"

cat > "$work/made.py" <<'PY'
import json

import transformers
from tokenizers import ByteLevelBPETokenizer

special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
trained = ByteLevelBPETokenizer()
trained.train_from_iterator(["the dogs ran at the cat"] * 9, vocab_size=300, min_frequency=1, special_tokens=special)
if transformers.__version__.startswith("4."):
    trained.save_model(".")
    tokenizer = transformers.RobertaTokenizerFast("vocab.json", "merges.txt")
else:
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = transformers.RobertaTokenizerFast(vocab=model["vocab"], merges=merges)


def cut_words() -> object:
    try:
        encoding = tokenizer("the dogs ran".split(), is_split_into_words=True, add_special_tokens=False)
    except AssertionError:
        return "AssertionError"
    return tokenizer.convert_ids_to_tokens(encoding.input_ids)
PY

install transformers==4.57.6 tokenizers==0.22.2
run 2> log <<'PY' || { cat log; exit 1; }
from finding import report
from made import cut_words

report("transformers", expected="a refusal", seen=cut_words(), stated="AssertionError")
PY

install transformers==5.23.0 tokenizers==0.23.3
run 2> log <<'PY' || { cat log; exit 1; }
from finding import report
from made import cut_words, tokenizer

print(f"  the text as a whole: {tokenizer.tokenize('the dogs ran')}")
report("transformers", expected="a refusal, or these tokens", seen=cut_words(), stated=["the", "do", "gs", "ran"])
PY
