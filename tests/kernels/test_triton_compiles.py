"""The kernels compile for GPUs that are not there, fit them, and keep what makes them fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # that a block may have


# dtype:head dimension:capability, and how it is called (compile_ahead.py). A100, RTX 30/40 and H100, the largest head
# dimension and the common one.
FIXED = ("bf16:64:80", "fp16:128:86", "fp32:128:86", "bf16:32:90", "fp32:64:90")
# Entries are also added for torch's flash kernel, whose heads may have 256 dimensions.
OTHERS = ("bf16:64:90:step", "fp32:64:86:step", "bf16:128:80:step", "bf16:256:86:step", "bf16:64:90:ones")
OTHER_WAYS = ("bf16:64:90:ones", "fp16:64:80:uneven", "bf16:64:80:plain")
WINDOWS = ("bf16:64:90:window", "bf16:64:80:window", "fp32:64:86:window", "bf16:64:90:window:others")


def compile_ahead(*cases: str) -> list[dict]:
    environment = dict(os.environ)
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = f"{root}:{environment.get('PYTHONPATH', '')}"
    run = [sys.executable, str(root / "tests" / "support" / "compile_ahead.py"), *cases]
    lines = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
    return [json.loads(line) for line in lines.splitlines()]


@pytest.fixture(scope="module")
def compiled():
    """By case, what is known of its kernels; all from one process."""
    found = defaultdict(list)
    for facts in compile_ahead(*FIXED, *(f"{case}:others" for case in OTHERS), *OTHER_WAYS, *WINDOWS):
        found[facts["case"]].append(facts)
    return found


@pytest.mark.slow
def test_fixed_tiles_fit_every_gpu(compiled):
    for case in FIXED:
        assert len(compiled[case]) == 3
        for facts in compiled[case]:
            assert facts["shared_bytes"] <= SHARED_BYTES[facts["capability"]], facts


@pytest.mark.slow
def test_the_other_kernels_fit_every_gpu(compiled):
    names = {"dropout_keys_kernel", "finish_kernel", "row_terms_kernel", "entries_kernel"}
    for case in OTHERS:
        assert {facts["kernel"] for facts in compiled[f"{case}:others"]} == names
        for facts in compiled[f"{case}:others"]:
            assert facts["shared_bytes"] <= SHARED_BYTES[facts["capability"]], facts
            assert facts["spilled_bytes"] == 0, facts


@pytest.mark.slow
def test_other_ways_to_call_them(compiled):
    assert [len(compiled[case]) for case in OTHER_WAYS] == [3, 3, 3]


@pytest.mark.slow
def test_windows_fit_every_gpu(compiled):
    """And spill nothing on a Hopper; on an A100 dK and dV do in bfloat16 with these tiles, without a window too."""
    for case in WINDOWS:
        assert len(compiled[case]) >= 3
        for facts in compiled[case]:
            assert facts["shared_bytes"] <= SHARED_BYTES[facts["capability"]], facts
            assert facts["spilled_bytes"] == 0 or facts["capability"] == 80, facts


@pytest.mark.full
def test_hopper_tiles_of_bert():
    """bfloat16, heads of 64: something to choose from that spills no registers and serialises no matrix instruction."""
    found = compile_ahead("bf16:64:90:step:all")
    for kernel in ("forward_kernel", "grad_kv_kernel", "grad_q_kernel"):
        rows = [facts for facts in found if facts["kernel"] == kernel]
        assert all(facts["matrix_instructions"] >= 6 for facts in rows)
        assert all(facts["matrix_waits"] < facts["matrix_instructions"] for facts in rows), rows
        assert sum(facts["spilled_bytes"] == 0 for facts in rows) >= 3, rows
