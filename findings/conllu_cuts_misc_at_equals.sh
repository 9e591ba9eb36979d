#!/usr/bin/env bash
# conllu 6.0.0: a MISC value is cut at its second "=", and reading and writing a file loses the rest.
#
# MISC holds `Name=Value` pairs, and values may contain "=": addresses, formulas, glosses. One would guess that a reader
# splits at the first "=" only. This one splits at every "=" and keeps two parts: no error, and the shortened value is
# written back. An empty value (`Gloss=`) comes back as `Gloss=_`.
#
# Seen on 2026-12-01: Ref=https://example.org/?page=3|Gloss=|SpaceAfter=No →
# Ref=https://example.org/?page|Gloss=_|SpaceAfter=No
# Source: conllu/parser.py, parse_dict_value: `part.split("=")[0]` and `part.split("=")[1]`.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install conllu==6.0.0
run <<'PY'
import conllu
from finding import report

misc = "Ref=https://example.org/?page=3|Gloss=|SpaceAfter=No"
text = f"# sent_id = 1\n# text = Stop\n1\tStop\tstop\tVERB\t_\t_\t0\troot\t_\t{misc}\n\n"
written = conllu.parse(text)[0].serialize()
report(
    "conllu",
    expected=misc,
    seen=written.splitlines()[2].split("\t")[9],
    stated="Ref=https://example.org/?page|Gloss=_|SpaceAfter=No",
)
PY
