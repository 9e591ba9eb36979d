#!/usr/bin/env bash
# The whole loop of the paper on one machine, with the embedded corpus: corpus → packed data → three runs (base, SAS-,
# SAS+) → evaluation of the exported model → report. Three minutes on two cores.
#
#   bash examples/quickstart.sh DIRECTORY
set -euo pipefail
out=${1:?usage: quickstart.sh DIRECTORY}
here=$(cd "$(dirname "$0")/.." && pwd)
if [ -e "$out" ]; then
    echo "error: $out exists already; remove it (make clean) or give another directory" >&2
    exit 2
fi
mkdir -p "$out"
say() { printf '\n== %s\n' "$*"; }

say "the embedded corpus: text with gold trees, vocabulary, treebank, minimal pairs"
python "$here/tools/make_toy_corpus.py" --output "$out/corpus" --train-sentences 60000 --pairs 100

say "text and trees to packed sequences"
for part in train validation; do
    python "$here/tools/preprocess_data.py" --input "$out/corpus/$part.conllu" --parser conllu \
        --tokenizer "$out/corpus/vocab.txt" --seq-length 34 --output "$out/data/$part" --workers 2
done

# train NAME LAMBDA PORT: λ > 0 suppresses syntactic attention, λ < 0 promotes it
train() {
    deepspeed --num_gpus 1 --master_port "$3" "$here/pretrain_mlm.py" --config "$here/examples/toy.yaml" \
        --run.output_dir "$out/$1" --data.train "$out/data/train" --data.validation "$out/data/validation" \
        --evaluation.treebank "$out/corpus/treebank.conllu" --evaluation.blimp "$out/corpus/blimp" \
        --train.steps 1000 --checkpoint.every 1000 \
        "--sas.schedule=$2"
}

# When base fails or is interrupted, the others, which run in the background, save and end as well.
stop() {
    touch "$out/sas-minus/stop" "$out/sas-plus/stop" 2>/dev/null || true
    wait
    exit 1
}

say "runs base (λ = 0), sas-minus (λ = 0.02) and sas-plus (λ = -0.02) side by side; the output of the last two is in $out/*.log"
export OMP_NUM_THREADS=1
train sas-minus 0.02 29542 >"$out/sas-minus.log" 2>&1 &
minus=$!
train sas-plus -0.02 29543 >"$out/sas-plus.log" 2>&1 &
plus=$!
trap stop INT TERM
train base 0 29541 || stop
wait $minus || { cat "$out/sas-minus.log"; exit 1; }
wait $plus || { cat "$out/sas-plus.log"; exit 1; }
trap - INT TERM
tail -n 2 "$out/sas-minus.log" "$out/sas-plus.log"
unset OMP_NUM_THREADS

say "the base model as a Hugging Face model, evaluated on the whole treebank and all minimal pairs"
python "$here/tools/convert_checkpoint.py" to-hf "$out/base" "$out/base-hf"
python "$here/tools/eval_syntax.py" --model "$out/base-hf" --treebank "$out/corpus/treebank.conllu" \
    --output "$out/base-syntax.json"
python "$here/tools/eval_blimp.py" --model "$out/base-hf" --blimp "$out/corpus/blimp" --output "$out/base-blimp.json"

say "report"
python "$here/tools/analyze_trajectory.py" "$out/base" "$out/sas-minus" "$out/sas-plus" --delta 100 --output "$out/report"
echo "open $out/report/report.html"
