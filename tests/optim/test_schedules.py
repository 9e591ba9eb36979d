"""Schedules of the learning rate and of every weight λ, by completed updates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup, get_wsd_schedule

from megatron_sas.optim.schedules import SCHEDULES, Cosine, Linear, Stage, Stages, Wsd, plateau, read_schedule, role

VALUES = st.floats(-1, 1)


@st.composite
def sound_schedules(draw):
    """Stages one after another with gaps, in any order; the last may be endless."""
    borders = sorted(draw(st.lists(st.integers(0, 60), min_size=2, max_size=8, unique=True)))
    stages = []
    for start, end in zip(borders[::2], borders[1::2], strict=False):
        stages.append(Stage(start, draw(VALUES), end, draw(st.one_of(st.none(), VALUES))))
    if draw(st.booleans()):
        stages.append(Stage(borders[-1], draw(VALUES)))
    return draw(st.permutations(stages))


@given(sound_schedules(), st.integers(0, 80))
def test_equals_the_definition(stages, step):
    assert Stages(stages).faults() == []
    covering = [s for s in stages if step in range(s.start, 10**6 if s.end is None else s.end)]
    assert len(covering) <= 1
    if not covering:
        expected = 0.0
    elif covering[0].end_value is None:
        expected = covering[0].value
    else:
        stage = covering[0]
        slope = (stage.end_value - stage.value) / (stage.end - stage.start)
        expected = stage.value + slope * (step - stage.start)
    assert Stages(stages)(step) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 20), st.one_of(st.none(), st.integers(1, 10))), min_size=1, max_size=5))
def test_every_overlap_is_reported(pairs):
    stages = [Stage(start, 0.1, None if length is None else start + length) for start, length in pairs]
    covered = [set(range(s.start, 100 if s.end is None else s.end)) for s in stages]
    overlaps = {(i, j) for i in range(len(stages)) for j in range(i) if covered[i] & covered[j]}
    assert len(Stages(stages).faults()) == len(overlaps)


def test_faults_are_named():
    assert Stages([Stage(0, 0.1, 10), Stage(5, 0.2)]).faults() == [
        "stages 0 and 1 overlap: stage 0 lasts until 10, stage 1 starts at 5"
    ]
    assert Stages([Stage(0, 0.1), Stage(5, 0.2)]).faults() == [
        "stages 0 and 1 overlap: stage 0 lasts for ever, stage 1 starts at 5"
    ]
    assert Stages([Stage(0, 0.1, 5), Stage(5, 0.2)]).faults() == []
    assert "must not be negative" in Stages([Stage(-1, 0.1, 5)]).faults()[0]
    assert "end 3 is not after start 3" in Stages([Stage(3, 0.1, 3)]).faults()[0]
    assert "needs an end" in Stages([Stage(3, 0.1, None, 0.2)]).faults()[0]


def test_the_papers_multistage_run():
    """SAS-(3k): λ = 0.001 for the first 3000 updates, then 0."""
    stages = [Stage(0, 0.001, 3000)]
    assert [Stages(stages)(step) for step in (0, 2999, 3000, 10**6)] == [0.001, 0.001, 0.0, 0.0]


@pytest.mark.parametrize(
    ("stages", "found", "kind"),
    [
        ([], (0, 100), "base"),
        ([Stage(0, 0.1)], (0.1, 100), "suppress"),
        ([Stage(0, -0.1)], (-0.1, 100), "promote"),
        ([Stage(0, 0.1, 40)], (0.1, 40), "release"),
        ([Stage(0, -0.1, 40)], (-0.1, 40), "other"),
        ([Stage(0, 0.1, 100)], (0.1, 100), "suppress"),  # released when it is over
        ([Stage(0, 0.1, 40), Stage(40, 0.1)], (0.1, 100), "suppress"),
        ([Stage(40, 0.1, 70), Stage(0, 0.1, 40)], (0.1, 70), "release"),
        ([Stage(0, 0.1, 40), Stage(60, 0.1)], None, "other"),
        ([Stage(10, 0.1)], None, "other"),
        ([Stage(0, 0.1, 40), Stage(40, 0.2)], None, "other"),
        ([Stage(0, 0.1, 40, 0.2)], None, "other"),
        ([Stage(0, 0.0, 40, 0.2)], None, "other"),
        ([Stage(0, 0.1, 40, 0.1)], (0.1, 40), "release"),
        ([Stage(200, 0.1)], (0, 100), "base"),  # after the end
    ],
)
def test_what_a_schedule_is_in_an_experiment(stages, found, kind):
    assert plateau(Stages(stages), 100) == found
    assert role(Stages(stages), [], steps=100, heads=None) == kind
    assert role(Stages(stages), [], steps=100, heads="permuted") == ("base" if kind == "base" else "control")
    if found is not None:  # as the schedule has it, update by update
        assert all(Stages(stages)(step) == (found[0] if step < found[1] else 0) for step in range(100))


def test_stages_in_words():
    assert Stages([]).describe() == "0"
    assert Stages([Stage(0, -0.02)]).describe() == "−0.02"
    assert (
        Stages([Stage(30, 0.5, 40, 0.0), Stage(0, 0.1, 30)]).describe()
        == "0.1 in steps 0 to 30, 0.5 to 0 in steps 30 to 40, then 0"
    )


TRANSFORMERS = {
    "linear": lambda optimizer, warmup, decay, horizon: get_linear_schedule_with_warmup(optimizer, warmup, horizon),
    "cosine": lambda optimizer, warmup, decay, horizon: get_cosine_schedule_with_warmup(optimizer, warmup, horizon),
    "wsd": lambda optimizer, warmup, decay, horizon: get_wsd_schedule(
        optimizer, warmup, decay, num_training_steps=horizon, decay_type="linear"
    ),
}


@pytest.mark.parametrize("kind", [name for name in SCHEDULES if name != "stages"])
@settings(max_examples=30, deadline=None)
@given(warmup=st.integers(0, 20), stable=st.integers(0, 20), decay=st.integers(1, 40), peak=st.floats(1e-6, 1.0))
def test_kinds_equal_those_of_transformers(kind, warmup, stable, decay, peak):
    horizon = warmup + stable + decay
    options = {"decay_steps": decay} if kind == "wsd" else {}
    ours = SCHEDULES[kind](value=peak, warmup_steps=warmup, decay_horizon=horizon, **options)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    theirs = TRANSFORMERS[kind](optimizer, warmup, decay, horizon)
    assert ours.faults() == []
    for step in range(horizon + 1):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-16)
        optimizer.step()
        theirs.step()
    assert [ours(step) for step in (horizon, horizon + 1, 10 * horizon)] == [0.0, 0.0, 0.0]


def test_the_papers_learning_rate_has_the_same_bits():
    """lr·s/W, then lr·max(0, (H - s)/(H - W)), in this order of operations."""
    rate, warmup, horizon = 1e-4, 10_000, 1_000_000
    schedule = Linear(rate, horizon, warmup)
    for step in (0, 1, 7, 9_999):
        assert schedule(step) == rate * step / warmup
    for step in (10_000, 10_007, 100_000, 999_999, 1_000_001):
        assert schedule(step) == rate * max(0.0, (horizon - step) / (horizon - warmup))


def test_wsd_decays_over_a_tenth_of_the_horizon_by_default():
    schedule = Wsd(1.0, 100, 10)
    assert [schedule(step) for step in (0, 5, 10, 90, 95, 100)] == [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    assert Wsd(1.0, 5)(4) == 1.0


def test_faults_of_kinds_are_named():
    for kind in (Linear, Cosine, Wsd):
        assert kind(1.0, 10, 10).faults() == ["warmup_steps: 10 is not before decay_horizon 10"]
    assert Wsd(1.0, 100, 50, 60).faults() == ["warmup_steps: 50 is after the decay begins, at step 40"]


@pytest.mark.parametrize("kind", [Linear, Cosine, Wsd])
def test_a_kind_is_no_plateau_unless_it_is_zero(kind):
    assert plateau(kind(0.1, 50), 100) is None
    assert role(kind(0.1, 50), [], steps=100, heads=None) == "other"
    assert role(kind(0.1, 50), [], steps=100, heads="permuted") == "control"
    assert (plateau(kind(0.0, 50), 100), role(kind(0.0, 50), [], steps=100, heads=None)) == ((0.0, 100), "base")


def test_another_term_makes_a_run_neither_base_nor_suppressed():
    zero, one = Stages([]), Stages([Stage(0, 0.1)])
    assert role(one, [zero], steps=100, heads=None) == "suppress"
    assert role(one, [zero, one], steps=100, heads=None) == "other"
    assert role(zero, [one], steps=100, heads="permuted") == "other"


def test_schedules_are_read_as_written():
    assert read_schedule(0) == read_schedule([]) == Stages([])
    assert read_schedule(-0.02) == Stages([Stage(0, -0.02)])
    assert read_schedule({"kind": "wsd", "value": 1, "decay_horizon": 9}) == Wsd(1.0, 9)


def test_kinds_in_words():
    assert (
        Linear(-0.5, 2000, 10).describe() == "−0.5, linear warm-up over 10 updates, linear decay to 0 at update 2,000"
    )
    assert Cosine(0.0, 2000, 10).describe() == "0"
    assert Wsd(1.0, 2000, 10, 100).course().endswith("constant, linear decay to 0 from update 1,900 to 2,000")
