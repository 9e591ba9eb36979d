#!/usr/bin/env bash
# BERT and ModernBERT on the embedded language, from nothing to a report of what was measured while they trained. Started
# again it goes on where it was.
#
#   bash examples/experiments/encoders.sh DIRECTORY [JOBS]
set -euo pipefail
out=${1:?usage: encoders.sh DIRECTORY [JOBS]}
jobs=${2:-$(nproc)}
here=$(cd "$(dirname "$0")/../.." && pwd)
tools=$here/tools

if [ ! -e "$out/corpus" ]; then
    python "$tools/make_toy_corpus.py" --output "$out/corpus" --train-sentences 60000 --workers "$jobs"
fi
for part in train validation; do
    if [ ! -e "$out/data/$part.json" ]; then
        python "$tools/preprocess_data.py" --input "$out/corpus/$part.conllu" --parser conllu \
            --tokenizer "$out/corpus/vocab.txt" --seq-length 34 --output "$out/data/$part" --workers "$jobs" --overwrite
    fi
done
python "$tools/run_sweep.py" "$here/examples/experiments/encoders.yaml" --output "$out/runs" --jobs "$jobs" \
    --data.train "$out/data/train" --data.validation "$out/data/validation" \
    --evaluation.treebank "$out/corpus/treebank.conllu" --evaluation.blimp "$out/corpus/blimp"
python "$tools/analyze_trajectory.py" "$out/runs" --delta 200 --output "$out/report"
