"""The scaling page and its program."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
from scaling_model import MODELS, Cluster, Collective, bandwidth, checkpoint_interval, collectives, renew, step_time

from megatron_sas.core.cli import InputError

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_program_says():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert renew(page, Cluster()) == page, "run: python tools/scaling_model.py --write docs/scaling.md"
    assert renew(page, Cluster(mfu=0.3)) != page


def test_bytes_of_a_ring():
    """4 processes each send 3/4 of the data to reduce-scatter or to gather it; an all-reduce is both."""
    assert Collective("all_gather", 100, 2, 1).bytes_sent(4) == 150
    assert Collective("all_reduce", 100, 2, 1).bytes_sent(4) == 300
    assert Collective("all_reduce", 100, 2, 1).bytes_sent(1) == 0


def test_only_zero_2_and_3_pay_for_accumulation():
    def elements(stage, accumulation):
        return sum(m.elements for m in collectives(stage, "bf16", 1_000, accumulation, 10))

    assert elements(1, 8) == elements(1, 1)
    assert elements(2, 8) == 8 * 1_000 + 1_000
    assert elements(3, 8) == 8 * 3_000


def test_dalys_interval_is_where_the_expected_time_is_least():
    """Against Daly's exact expected time, M·exp(R/M)·(exp((τ+δ)/M)-1)·T/τ, minimised by search."""
    for cost, mtbf in ((1.0, 1e4), (60.0, 3_600.0), (300.0, 7_200.0)):
        wall = {tau: (math.exp((tau + cost) / mtbf) - 1) / tau for tau in (mtbf * i / 20_000 for i in range(1, 40_000))}
        assert checkpoint_interval(cost, mtbf) == pytest.approx(min(wall, key=wall.get), rel=0.02)


def test_slow_adapters_bound_the_step():
    fast, slow = Cluster(), Cluster(nics_per_node=1, nic_gb_s=12.5)
    assert bandwidth(slow, 8) == bandwidth(fast, 8) > bandwidth(slow, 16)
    model = MODELS[0]
    one = step_time(slow, model, 1, 16, model.micro_batch, 1)
    sent = 3 * 15 / 16 * model.parameters * 2
    assert one.communication == pytest.approx(sent / (12.5e9 * 0.8), rel=0.01)
    assert step_time(slow, model, 1, 1, model.micro_batch, 1).communication == 0


def test_command_line(tmp_path):
    command = [sys.executable, ROOT / "tools" / "scaling_model.py"]
    done = subprocess.run([*command, "--gpu", "abacus"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: --gpu abacus: unknown; name it as torch.cuda.get_device_name() does\n",
    )
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(InputError, match="add it"):
        renew(page.read_text(), Cluster())
