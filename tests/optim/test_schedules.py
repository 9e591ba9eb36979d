"""λ by completed updates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sas.optim.schedules import Stage, check_stages, describe_stages, plateau, role, sas_weight

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
    assert check_stages(stages) == []
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
    assert sas_weight(stages, step) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 20), st.one_of(st.none(), st.integers(1, 10))), min_size=1, max_size=5))
def test_every_overlap_is_reported(pairs):
    stages = [Stage(start, 0.1, None if length is None else start + length) for start, length in pairs]
    covered = [set(range(s.start, 100 if s.end is None else s.end)) for s in stages]
    overlaps = {(i, j) for i in range(len(stages)) for j in range(i) if covered[i] & covered[j]}
    assert len(check_stages(stages)) == len(overlaps)


def test_faults_are_named():
    assert check_stages([Stage(0, 0.1, 10), Stage(5, 0.2)]) == [
        "stages 0 and 1 overlap: stage 0 lasts until 10, stage 1 starts at 5"
    ]
    assert check_stages([Stage(0, 0.1), Stage(5, 0.2)]) == [
        "stages 0 and 1 overlap: stage 0 lasts for ever, stage 1 starts at 5"
    ]
    assert check_stages([Stage(0, 0.1, 5), Stage(5, 0.2)]) == []
    assert "must not be negative" in check_stages([Stage(-1, 0.1, 5)])[0]
    assert "end 3 is not after start 3" in check_stages([Stage(3, 0.1, 3)])[0]
    assert "needs an end" in check_stages([Stage(3, 0.1, None, 0.2)])[0]


def test_the_papers_multistage_run():
    """SAS-(3k): λ = 0.001 for the first 3000 updates, then 0."""
    stages = [Stage(0, 0.001, 3000)]
    assert [sas_weight(stages, step) for step in (0, 2999, 3000, 10**6)] == [0.001, 0.001, 0.0, 0.0]


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
    assert plateau(stages, 100) == found
    assert role(stages, 100, None) == kind
    assert role(stages, 100, "permuted") == ("base" if kind == "base" else "control")
    if found is not None:  # as sas_weight has it, update by update
        assert all(sas_weight(stages, step) == (found[0] if step < found[1] else 0) for step in range(100))


def test_stages_in_words():
    assert describe_stages([]) == "0"
    assert describe_stages([Stage(0, -0.02)]) == "−0.02"
    assert (
        describe_stages([Stage(30, 0.5, 40, 0.0), Stage(0, 0.1, 30)])
        == "0.1 in steps 0 to 30, 0.5 to 0 in steps 30 to 40, then 0"
    )
