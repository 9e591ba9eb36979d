#!/usr/bin/env bash
# udtools 0.2.9: its evaluator leaves out three features that its own validator calls universal.
#
# `udeval` promises in UFeats, AllTags and MLAS "how well does universal FEATS match". One would guess that these are
# the universal features of the same package's validator. But the evaluator has the list of 2018, without Clusivity,
# NounClass and Typo: a tagger that gets all noun classes of a Bantu language wrong, or never marks a typo, scores 100.
#
# Seen on 2026-12-01: left out Clusivity, NounClass, Typo; UFeats 100.00 without Typo=Yes, 66.67 with a wrong Number
# Source: udtools/udeval.py, UNIVERSAL_FEATURES; udtools/data/feats.json, entries of type "universal".
set -euo pipefail
source "$(dirname "$0")/common.sh"
install udtools==0.2.9
cat > gold.conllu <<'CONLLU'
# sent_id = 1
# text = Teh dogs bark
1	Teh	the	DET	DT	Definite=Def|PronType=Art|Typo=Yes	2	det	_	CorrectForm=The
2	dogs	dog	NOUN	NNS	Number=Plur	3	nsubj	_	_
3	bark	bark	VERB	VBP	Mood=Ind|Number=Plur|Person=3|Tense=Pres|VerbForm=Fin	0	root	_	_

CONLLU
sed 's/|Typo=Yes//' gold.conllu > no_typo.conllu
sed 's/NNS	Number=Plur/NNS	Number=Sing/' gold.conllu > wrong_number.conllu
run <<'PY'
import importlib.resources
import json
import subprocess

from finding import report
from udtools.udeval import UNIVERSAL_FEATURES


def ufeats(system: str) -> str:
    table = subprocess.run(["udeval", "-v", "gold.conllu", system], capture_output=True, text=True, check=True).stdout
    return next(line for line in table.splitlines() if line.startswith("UFeats")).split("|")[3].strip()


languages = json.loads((importlib.resources.files("udtools") / "data/feats.json").read_text())["features"]
universal = {
    name for features in languages.values() for name, entry in features.items() if entry["type"] == "universal"
}
left_out = sorted(universal - UNIVERSAL_FEATURES)
report(
    "udtools",
    expected="no universal feature is left out; each file has one wrong word of three: 66.67, 66.67",
    seen=f"left out: {left_out}; {ufeats('no_typo.conllu')}, {ufeats('wrong_number.conllu')}",
    stated="left out: ['Clusivity', 'NounClass', 'Typo']; 100.00, 66.67",
)
PY
