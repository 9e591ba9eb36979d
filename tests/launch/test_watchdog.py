"""The watchdog's clock, without waiting; `faults/test_faults.py` has hung and suspended processes."""

from __future__ import annotations

import sys
import types

import pytest

from megatron_sas.launch.watchdog import STORE_SILENT, Watchdog


@pytest.fixture
def clock():
    """Seconds that pass only when a test says so."""
    return types.SimpleNamespace(now=1000.0)


def watch(clock, tells, rounds):
    """Run a watchdog of 40 s for so many rounds; `tells` are (seconds, answer) of telling the others, in turn."""
    dog = Watchdog(40 / 60, clock=lambda: clock.now, exit=sys.exit)
    tells = iter(tells)

    def tell():
        seconds, answer = next(tells)
        clock.now += seconds
        return answer

    def wait(seconds):
        nonlocal rounds
        clock.now += seconds
        rounds -= 1
        return rounds == 0

    dog._tell, dog._ended = tell, types.SimpleNamespace(wait=wait, is_set=lambda: False)
    dog._watch()


@pytest.mark.parametrize("answer", [None, "it waits for nobody else"])
def test_a_suspension_is_no_hang_wherever_it_falls(clock, answer):
    watch(clock, [(100.0, answer), (0.0, answer), (0.0, answer)], rounds=3)


def test_waiting_for_a_silent_store_is_no_suspension(clock):
    with pytest.raises(SystemExit):
        watch(clock, [(15.0, STORE_SILENT)] * 9, rounds=9)


def test_no_progress(clock, capsys):
    with pytest.raises(SystemExit) as exit_:
        watch(clock, [(0.0, "it waits for nobody else")] * 9, rounds=9)
    assert exit_.value.code == 3
    assert "no progress for 0.666667 minutes in starting" in capsys.readouterr().err
