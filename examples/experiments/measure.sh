#!/usr/bin/env bash
# Everything measured on every snapshot of the runs of a sweep, then the report. Started again it goes on where it was.
#
#   bash examples/experiments/measure.sh RUNS TREEBANK BLIMP TEXT_PREFIX REPORT [option of eval_trajectory.py …]
#
# With the environment variable GLUE, a folder like the GLUE download, the final model of every run is fine-tuned on all
# tasks as well, with three seeds, into RUN/glue: 8.6 million examples a run. If a run went on after that, its results are
# of another model than its final one, and are refused: remove RUN/glue first.
set -euo pipefail
usage="usage: measure.sh RUNS TREEBANK BLIMP TEXT_PREFIX REPORT [option of eval_trajectory.py …]"
runs=${1:?$usage} treebank=${2:?$usage} blimp=${3:?$usage} text=${4:?$usage} report=${5:?$usage}
shift 5
glue=${GLUE:-}
if [ -n "$glue" ] && [ ! -d "$glue" ]; then
    echo "error: GLUE=$glue: no such folder; give one like the GLUE download" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")/../.." && pwd)
has_models() { compgen -G "$1/snapshots/step_*" || compgen -G "$1/checkpoints/step_*" || [ -e "$1/lineage.json" ]; }
measured=()
for run in "$runs"/*/seed-*; do
    if has_models "$run" >/dev/null; then
        measured+=("$run")
    else
        printf '\n== %s has no models yet and is passed over\n' "$run"
    fi
done
if [ ${#measured[@]} -gt 0 ]; then
    printf '\n== measurements of %s runs\n' ${#measured[@]}
    python "$here/tools/eval_trajectory.py" "${measured[@]}" --treebank "$treebank" --blimp "$blimp" --text "$text" "$@"
fi
if [ -n "$glue" ]; then
    for run in "${measured[@]}"; do
        python "$here/tools/finetune_glue.py" --model "$run" --task all --data "$glue" --output "$run/glue"
    done
fi
printf '\n== report\n'
python "$here/tools/analyze_trajectory.py" "$runs" --output "$report" --overwrite
echo "open $report/report.html"
