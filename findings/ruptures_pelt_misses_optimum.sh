#!/usr/bin/env bash
# ruptures 1.1.10: Pelt with a minimum length of segments may miss the optimum, even of a single break.
#
# PELT is known, and documented, as exact: it minimises the cost of the segments plus a penalty for each. One would
# guess that Pelt with jump=1, KernelCPD with the linear kernel (the same cost) and trying all segmentations agree. With
# min_size > 1 Pelt drops a break in favour of one that is too near to the end to be allowed, and never sees the best
# one. Nothing in the result shows that a break is one step off. (Of 400 random signals of this length Pelt missed the
# optimum in 20, KernelCPD with its own pruning in 11; Dynp, which gets the number of breaks, in none.)
#
# Seen on 2026-12-01 for 12 points, min_size 4, penalty 2: Pelt breaks at 7, cost 102.63; KernelCPD and trying all at 6,
# 98.17.
# Source: ruptures/detection/pelt.py, _seg: `admissible` is pruned at `bkp` as if a break at `bkp` could replace the
# candidate at once; such a break is allowed only for ends that are min_size points later.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install ruptures==1.1.10 numpy==2.4.6 scipy==1.17.1
run <<'PY'
import itertools

import numpy as np
import ruptures as rpt
from finding import report

MIN_SIZE, PENALTY = 4, 2
signal = np.array([2, 4, 7, 9, 3, 1, 7, 8, 5, 0, 8, 7], dtype=float)


def cost(breaks: list[int]) -> float:
    parts = np.split(signal, breaks[:-1])
    return sum(((part - part.mean()) ** 2).sum() for part in parts) + PENALTY * len(parts)


def allowed(breaks: list[int]) -> bool:
    return all(end - start >= MIN_SIZE for start, end in zip([0, *breaks], breaks))


n = len(signal)
every = [[*inner, n] for count in range(n) for inner in itertools.combinations(range(1, n), count)]
found = {
    "Pelt": rpt.Pelt(model="l2", min_size=MIN_SIZE, jump=1).fit_predict(signal, pen=PENALTY),
    "KernelCPD": rpt.KernelCPD(kernel="linear", min_size=MIN_SIZE).fit_predict(signal, pen=PENALTY),
    "all tried": min(filter(allowed, every), key=cost),
}
report(
    "ruptures",
    expected="three times the same",
    seen=", ".join(f"{name} {[int(b) for b in breaks]} cost {cost(breaks):.2f}" for name, breaks in found.items()),
    stated="Pelt [7, 12] cost 102.63, KernelCPD [6, 12] cost 98.17, all tried [6, 12] cost 98.17",
)
PY
