#!/usr/bin/env bash
# Everything measured on every snapshot of the runs of a sweep, then the report. Started again it goes on where it was.
#
#   bash examples/experiments/measure.sh RUNS TREEBANK BLIMP TEXT_PREFIX REPORT [option of eval_trajectory.py …]
set -euo pipefail
usage="usage: measure.sh RUNS TREEBANK BLIMP TEXT_PREFIX REPORT [option of eval_trajectory.py …]"
runs=${1:?$usage} treebank=${2:?$usage} blimp=${3:?$usage} text=${4:?$usage} report=${5:?$usage}
shift 5
here=$(cd "$(dirname "$0")/../.." && pwd)
for run in "$runs"/*/seed-*; do
    printf '\n== measurements of %s\n' "$run"
    python "$here/tools/eval_trajectory.py" "$run" --treebank "$treebank" --blimp "$blimp" --text "$text" "$@"
done
printf '\n== report\n'
python "$here/tools/analyze_trajectory.py" "$runs" --output "$report" --overwrite
echo "open $report/report.html"
