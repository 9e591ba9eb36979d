#!/usr/bin/env bash
# scikit-learn 1.9.1: PCA of float32 data that is not centred gives variances that the data does not have.
#
# Since 1.5 the default solver for many samples of few features is "covariance_eigh". It takes XᵀX of the data as it
# comes and subtracts n times the product of the means afterwards, in the data's own precision. In float32 this leaves
# nothing of the variance where the mean is a thousand times the standard deviation, and errors of a fifth at a hundred.
# Hidden states of transformers are such data: float32, with single dimensions far from zero. PCA's promise to centre
# makes it look safe; the result has no NaN and no warning.
#
# Seen on 2026-12-01: 2,000 × 128 standard normal values have variances from 0.57 to 1.59 along the components. With 1,000
# added to them the largest becomes 81 and the smallest 0; `svd_solver="full"`, or float64, gives 1.59 and 0.57.
# Source: sklearn/decomposition/_pca.py, PCA._fit_full: `C -= n_samples * ...` for covariance_eigh.
set -euo pipefail
source "$(dirname "$0")/common.sh"
install scikit-learn==1.9.1 numpy==2.4.6 scipy==1.17.1
run <<'PY'
import numpy as np
from finding import report
from sklearn.decomposition import PCA

values = np.random.default_rng(0).normal(size=(2000, 128))


def spectrum(data, **options):
    variances = PCA(**options).fit(data).explained_variance_
    return round(float(variances[0]), 1), round(float(variances[-1]), 1)


far = (values + 1000).astype("float32")
seen = [spectrum(values.astype("float32")), spectrum(far, svd_solver="full"), spectrum(far.astype("float64"))]
largest, smallest = spectrum(far)
report(
    "scikit-learn",
    expected="largest and smallest variance: (1.6, 0.6) for the data, and with 1,000 added by any solver",
    seen=(*seen, largest > 10, smallest),
    stated=((1.6, 0.6), (1.6, 0.6), (1.6, 0.6), True, 0.0),
)
PY
