#!/usr/bin/env bash
# scikit-dimension 0.5.0: one repeated point makes the maximum-likelihood dimension of a whole set 0.
#
# MLE (Levina and Bickel) combines the dimensions at all points by their harmonic mean. A point with a copy has a neighbour
# at distance 0, log(R/0) is infinite, so the dimension there is 0, and one zero makes the harmonic mean 0. `comb="mean"`
# moves to 5.2 instead, and TwoNN of the same package leaves such points to its discarded share. Repeated points are
# usual: the same sentence twice in a corpus has the same vector.
#
# Seen on 2026-12-01: 600 normal points in five dimensions give 4.9; with the last replaced by a copy of the first, 0.0.
# numpy warns of a division by zero; MLE itself says nothing.
# Source: skdim/id/_MLE.py, fit: `1 / np.mean(1 / self.dimension_pw_)`.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install scikit-dimension==0.5.0 numpy==2.4.6
run <<'PY'
import numpy as np
import skdim
from finding import report

points = np.random.default_rng(0).normal(size=(600, 5))
repeated = np.vstack([points[:-1], points[:1]])
seen = [round(float(skdim.id.MLE().fit(data).dimension_), 1) for data in (points, repeated)]
mean = round(float(skdim.id.MLE().fit(repeated, comb="mean").dimension_), 1)
two_nn = round(float(skdim.id.TwoNN().fit(repeated).dimension_), 1)
report(
    "scikit-dimension",
    expected="about 5 with and without one repeated point, for MLE, MLE by plain mean, and TwoNN",
    seen=(*seen, mean, two_nn),
    stated=(4.9, 0.0, 5.2, 4.8),
)
PY
