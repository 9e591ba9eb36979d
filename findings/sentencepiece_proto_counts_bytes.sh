#!/usr/bin/env bash
# SentencePiece 0.2.3: the replacement for `immutable_proto` counts bytes where the old one counted characters.
#
# Version 0.2.3 no longer accepts `out_type="immutable_proto"` and says: "Use return_type='proto' instead." One would
# guess that begin and end keep their unit. With a `str` as input they were characters in 0.2.1 and are UTF-8 bytes now,
# while `return_type="offset_mapping"` of the same version counts characters. English text shows no difference; after
# the first accent every span is one further to the right.
#
# Seen on 2026-12-01 for the piece "▁dog" of "café dog": 0.2.1 (4, 8); 0.2.3 proto (5, 9), offset_mapping (4, 8).
# Source: python/src/sentencepiece/__init__.py, Encode: "proto" is parsed from `_EncodeAsSerializedProto`, whose spans
# are those of the C++ library ("byte offsets" in sentencepiece.proto); 0.2.1 called ConvertToUnicodeSpans first.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install sentencepiece==0.2.1
cat > last_word.py <<'PY'
import sys

import sentencepiece as spm

# One piece a word: nothing is learned here but the words themselves.
spm.SentencePieceTrainer.train(
    sentence_iterator=iter(["café dog", "dog café"] * 50),
    model_prefix="m",
    model_type="word",
    vocab_size=5,
    minloglevel=2,
)
sp = spm.SentencePieceProcessor(model_file="m.model")
kind, text = sys.argv[1], "café dog"
if kind == "immutable_proto":
    piece = sp.encode(text, out_type=kind).pieces[-1]
    begin, end = piece.begin, piece.end
elif kind == "proto":
    piece = sp.encode(text, return_type=kind).pieces[-1]
    begin, end = piece.begin, piece.end
else:
    begin, end = sp.encode(text, return_type=kind)["offsets"][-1]
print((begin, end), repr(text[begin:end]))
PY
python last_word.py immutable_proto > old
install sentencepiece==0.2.3 protobuf==7.36.2
python last_word.py proto > new
python last_word.py offset_mapping > mapping
run <<'PY'
from pathlib import Path

from finding import report

report(
    "sentencepiece",
    expected="the same three times (0.2.1 immutable_proto, 0.2.3 proto, 0.2.3 offset_mapping)",
    seen=[Path(name).read_text().strip() for name in ("old", "new", "mapping")],
    stated=["(4, 8) ' dog'", "(5, 9) 'dog'", "(4, 8) ' dog'"],
)
PY
