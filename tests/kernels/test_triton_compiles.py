"""The kernels compile for GPUs that are not there, fit them, and keep what makes them fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}  # that a block may have


def compile_ahead(*cases: str) -> list[dict]:
    environment = dict(os.environ)
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = f"{root}:{environment.get('PYTHONPATH', '')}"
    run = [sys.executable, str(root / "tests" / "support" / "compile_ahead.py"), *cases]
    lines = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stdout
    return [json.loads(line) for line in lines.splitlines()]


@pytest.mark.slow
def test_fixed_tiles_fit_every_gpu():
    """A100, RTX 30/40 and H100, the largest head dimension and the common one."""
    found = compile_ahead("bf16:64:80", "fp16:128:86", "fp32:128:86", "bf16:32:90", "fp32:64:90")
    assert len(found) == 15
    for facts in found:
        assert facts["shared_bytes"] <= SHARED_BYTES[facts["capability"]], facts


@pytest.mark.slow
def test_the_other_kernels_fit_every_gpu():
    """Entries are also added for torch's flash kernel, whose heads may have 256 dimensions."""
    cases = ("bf16:64:90", "fp32:64:86", "bf16:128:80", "bf16:256:86")
    found = compile_ahead(*(f"{case}:step:others" for case in cases), "bf16:64:90:ones:others")
    names = {"dropout_keys_kernel", "finish_kernel", "row_terms_kernel", "entries_kernel"}
    assert len(found) == 20 and {facts["kernel"] for facts in found} == names
    for facts in found:
        assert facts["shared_bytes"] <= SHARED_BYTES[facts["capability"]], facts
        assert facts["spilled_bytes"] == 0, facts


@pytest.mark.slow
def test_other_ways_to_call_them():
    assert len(compile_ahead("bf16:64:90:ones", "fp16:64:80:uneven", "bf16:64:80:plain")) == 9


@pytest.mark.slow
def test_windows_fit_every_gpu():
    """And spill nothing on a Hopper; on an A100 dK and dV do in bfloat16 with these tiles, without a window too."""
    found = compile_ahead("bf16:64:90:window", "bf16:64:80:window", "fp32:64:86:window", "bf16:64:90:window:others")
    for facts in found:
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
