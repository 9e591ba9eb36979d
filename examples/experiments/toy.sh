#!/usr/bin/env bash
# The paper's experiment on the embedded language, from nothing to a report: corpus, packed data, controls, 11 conditions
# × 3 seeds, measurements of every snapshot, report. Started again it goes on where it was.
#
#   bash examples/experiments/toy.sh DIRECTORY [JOBS]
set -euo pipefail
out=${1:?usage: toy.sh DIRECTORY [JOBS]}
jobs=${2:-$(nproc)}
here=$(cd "$(dirname "$0")/../.." && pwd)
tools=$here/tools
say() { printf '\n== %s\n' "$*"; }

if [ ! -e "$out/corpus" ]; then
    say "the embedded corpus"
    python "$tools/make_toy_corpus.py" --output "$out/corpus" --train-sentences 60000 --workers "$jobs"
fi
for part in train validation; do
    if [ ! -e "$out/data/$part.json" ]; then
        say "text and trees of $part to packed sequences"
        python "$tools/preprocess_data.py" --input "$out/corpus/$part.conllu" --parser conllu \
            --tokenizer "$out/corpus/vocab.txt" --seq-length 34 --output "$out/data/$part" --workers "$jobs" --overwrite
    fi
done
bash "$here/examples/experiments/controls.sh" "$out/data/train"

say "runs"
python "$tools/run_sweep.py" "$here/examples/experiments/toy.yaml" --output "$out/runs" --jobs "$jobs" \
    --data.train "$out/data/train" --data.validation "$out/data/validation" \
    --evaluation.treebank "$out/corpus/treebank.conllu" --evaluation.blimp "$out/corpus/blimp"

bash "$here/examples/experiments/measure.sh" "$out/runs" "$out/corpus/treebank.conllu" "$out/corpus/blimp" \
    "$out/data/validation" "$out/report" --treebank-sentences 300 --pairs-per-set 50 --workers "$jobs"
