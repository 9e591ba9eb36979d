#!/usr/bin/env bash
# safetensors 0.8.0: saving a transposed numpy array keeps its shape and scrambles its values; 0.7.0 saved it correctly.
#
# The torch functions refuse a tensor that is not contiguous. One would guess that the numpy functions refuse too, or
# copy, as they did in 0.7.0. Version 0.8.0 writes the memory as it lies under the shape of the view: every array in
# Fortran order (a transposed weight, say) is loaded again with the right shape and type, but other values.
#
# Seen on 2026-12-01: [[0, 3], [1, 4], [2, 5]] → 0.7.0 the same, 0.8.0 [[0, 1], [2, 3], [4, 5]].
# Source: safetensors/numpy.py: 0.7.0 `tensor.tobytes()` (always C order), 0.8.0 `data_ptr=tensor.ctypes.data`. The
# docstring asks for "contiguous and dense" tensors; nothing checks it.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cat > round_trip.py <<'PY'
import numpy as np
from safetensors.numpy import load, save

transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
print(load(save({"weight": transposed}))["weight"].astype(int).tolist())
PY
install safetensors==0.7.0 numpy==2.4.6
python round_trip.py > old
install safetensors==0.8.0
python round_trip.py > new
run <<'PY'
from pathlib import Path

from finding import report

report(
    "safetensors numpy",
    expected="[[0, 3], [1, 4], [2, 5]] from both versions, or an error",
    seen=" / ".join(Path(name).read_text().strip() for name in ("old", "new")),
    stated="[[0, 3], [1, 4], [2, 5]] / [[0, 1], [2, 3], [4, 5]]",
)
PY
