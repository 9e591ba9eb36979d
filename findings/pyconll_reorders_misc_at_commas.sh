#!/usr/bin/env bash
# pyconll 3.3.1: a MISC value with commas becomes a set; reading and writing a file sorts its parts and drops repeated
# ones.
#
# In FEATS a comma separates values, and their order means nothing. In MISC a value is a plain string: a number, a
# gloss, a list of corrections. One would guess that it is kept. It is split at commas into a set, and written back
# sorted: "1,000,000" becomes "000,1", another number. A comment line that occurs twice is written once. (pyconll 4
# needs a newer Python and was not tried.)
#
# Seen on 2026-12-01: Value=1,000,000|Gloss=yes,no,yes → Gloss=no,yes|Value=000,1
# Source: pyconll/unit/token.py, `misc: dict[str, Optional[set[str]]]`, written by `_dict_mixed_conll_map`; comments are
# keys of a dictionary in pyconll/unit/sentence.py.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install pyconll==3.3.1
run <<'PY'
import pyconll
from finding import report

misc = "Value=1,000,000|Gloss=yes,no,yes"
text = f"# sent_id = 1\n# checked\n# checked\n1\tmillion\tmillion\tNUM\t_\t_\t0\troot\t_\t{misc}\n\n"
written = pyconll.load_from_string(text).conll()
report(
    "pyconll",
    expected=f"2 comments, {misc}",
    seen=f"{written.count('# checked')} comment, {written.strip().split(chr(9))[-1]}",
    stated="1 comment, Gloss=no,yes|Value=000,1",
)
PY
