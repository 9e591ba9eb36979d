#!/usr/bin/env bash
# statsmodels 0.15.0: a test that was not made makes the corrections of the others wrong.
#
# A condition with one seed has no test, and a table of p-values has NaN there. R's p.adjust and pingouin leave NaN out:
# the family is the tests that were made. `multipletests` counts NaN as tests for Holm and Bonferroni, so p is corrected
# for more of them than there are, and what is significant may not be; with Benjamini and Hochberg one NaN makes every
# corrected value NaN, and no hypothesis is rejected. There is no warning.
#
# Seen on 2026-12-01: of (0.01, 0.02, NaN, 0.04, NaN) Holm makes 0.05, 0.08, 0.12, where the three tests alone give 0.03,
# 0.04, 0.04; "fdr_bh" makes five NaN.
# Source: statsmodels/stats/multitest.py, multipletests: `ntests = len(pvals)`.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install statsmodels==0.15.0 numpy==2.4.6 scipy==1.17.1 pandas==3.1.1
run <<'PY'
import numpy as np
from finding import report
from statsmodels.stats.multitest import multipletests

values = np.array([0.01, 0.02, np.nan, 0.04, np.nan])
made = ~np.isnan(values)


def corrected(p, method):
    return multipletests(p, method=method)[1].round(2).tolist()


seen = (
    np.array(corrected(values, "holm"))[made].tolist(),
    corrected(values[made], "holm"),
    int(np.isnan(corrected(values, "fdr_bh")).sum()),
    bool(multipletests(values, method="holm")[0].sum() < multipletests(values[made], method="holm")[0].sum()),
)
report(
    "statsmodels",
    expected="Holm of the three tests that were made, with and without the two that were not: [0.03, 0.04, 0.04]",
    seen=seen,
    stated=([0.05, 0.08, 0.12], [0.03, 0.04, 0.04], 5, True),
)
PY
