#!/usr/bin/env bash
# Heads that are not syntax for packed data PREFIX, as the sweeps of this folder name them; those that exist are kept.
#
#   bash examples/experiments/controls.sh PREFIX
set -euo pipefail
prefix=${1:?usage: controls.sh PREFIX}
here=$(cd "$(dirname "$0")/../.." && pwd)
for control in permuted random_tree offset:-2; do
    name=${control%%:*}
    if [ ! -e "$prefix.heads-$name.json" ]; then
        python "$here/tools/make_control.py" --data "$prefix" --control "$control" --name "$name" --overwrite
    fi
done
