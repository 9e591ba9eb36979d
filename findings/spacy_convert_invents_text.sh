#!/usr/bin/env bash
# spaCy 3.8.18: `spacy convert` of CoNLL-U with multiword tokens makes a text that stands nowhere in the file.
#
# A CoNLL-U sentence says its text twice: in `# text`, and in the surface tokens. One would guess that the converted
# document has it. By default the multiword tokens are dropped and their words are glued together, as if these were the
# surface: "Vámonos al mar." becomes "Vamosnos ael mar. ". Everything that works from characters (offsets, a subword
# tokenizer, pretraining on doc.text) then sees words that do not exist. With `--merge-subtokens` the text is right, but
# the words of a multiword token are one, and their trees are smaller.
#
# Seen on 2026-12-01: 'Vamosnos ael mar. '
# Source: spacy/training/converters/conllu_to_docs.py, conllu_sentence_to_doc: comments are skipped, ranges only say
# where no space follows.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install spacy==3.8.18
cat > sea.conllu <<'CONLLU'
# sent_id = 1
# text = Vámonos al mar.
1-2	Vámonos	_	_	_	_	_	_	_	_
1	Vamos	ir	VERB	_	_	0	root	_	_
2	nos	nosotros	PRON	_	_	1	obj	_	_
3-4	al	_	_	_	_	_	_	_	_
3	a	a	ADP	_	_	5	case	_	_
4	el	el	DET	_	_	5	det	_	_
5	mar	mar	NOUN	_	_	1	obl	_	SpaceAfter=No
6	.	.	PUNCT	_	_	1	punct	_	_

CONLLU
mkdir split merged
convert() {
    python -m spacy convert sea.conllu "$@" --converter conllu --lang es > log 2>&1 || { cat log; exit 1; }
}
convert split
convert merged --merge-subtokens
run <<'PY'
import spacy
from finding import report
from spacy.tokens import DocBin

vocab = spacy.blank("es").vocab
split, merged = (next(DocBin().from_disk(f"{name}/sea.spacy").get_docs(vocab)) for name in ("split", "merged"))
report(
    "spacy",
    expected="'Vámonos al mar.' with 6 words",
    seen=f"{split.text!r} with {len(split)} words, {merged.text!r} with {len(merged)}",
    stated="'Vamosnos ael mar. ' with 6 words, 'Vámonos al mar. ' with 4",
)
PY
