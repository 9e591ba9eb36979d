"""The step of a model by its name: public series, numbers with units, and names that leave it open."""

from __future__ import annotations

import re

import pytest

from megatron_sas.core.cli import InputError
from megatron_sas.trajectory.step_names import last_number, step_by_pattern, steps_of_names


def test_decimal_numbers_count_as_one():
    names = ["v1.2-step_0.5M", "v1.2-step_1.5k", "v1.2-step_3.0", "v1.2-step_2B"]
    assert steps_of_names(names, "models") == [500_000, 1500, 3, 2_000_000_000]


@pytest.mark.parametrize(
    "name", ["step_1e5", "step_1.5e+05", "ckpt-1,000", "ckpt-1.000", "ckpt-1,5k", "step_1.5", "step_1.0005k", "v1.2.3"]
)
def test_numbers_that_may_mean_something_else_are_refused(name):
    with pytest.raises(InputError, match=r"^models/[^ ]*: the number in its name is no step"):
        steps_of_names([name, re.sub("[35](?=k?$)|1(?=[,.]0)", "2", name)], "models")
    with pytest.raises(InputError, match=r"^here: the number in its name is no step"):
        last_number(name, "here")


def test_the_last_number_is_that_of_a_single_model():
    assert [last_number(name, "here") for name in ("plain", "step_40", "seed_3-step_20k")] == [None, 40, 20_000]


def test_without_numbers_the_order_of_names_counts_and_is_reported():
    lines = []
    assert steps_of_names(["tiny", "base", "small"], "models", lines.append) == [2, 0, 1]
    assert lines == ["models: no numbers in the names, so the models count in the order of their names"]


OLMO = ["stage1-step5000-tokens21B", "stage1-step140000-tokens588B"]
PUBLIC = {
    "Pythia": {"step0": 0, "step1": 1, "step512": 512, "step1000": 1000, "step143000": 143_000},
    "MultiBERTs": {f"multiberts-seed_0-step_{n}k": n * 1000 for n in (0, 20, 200, 2000)},
    "BabyLM": {f"chck_{n}M": n * 1_000_000 for n in (1, 9, 10, 90, 100, 1000)},
    "OLMo": {"step1000-tokens4B": 1000, "step20000-tokens88B": 20_000, "step738020-tokens3264B": 738_020},
    "OLMo 2": {OLMO[0]: 5000, OLMO[1]: 140_000, "stage2-ingredient1-step1000-tokens5B": 141_000}
    | {"stage2-ingredient1-step23852-tokens51B": 163_852},
    "OLMo 3": {
        "olmo-7b-stage1-step337000": 337_000,
        "olmo-7b-stage2-step100": 337_100,
        "olmo-7b-stage3-step9": 337_109,
    },
    "Ettin": {"step500000": 500_000, "step599525": 599_525, "ext2000": 601_525, "decay100": 601_625},
    "Trainer": {"checkpoint-500": 500, "checkpoint-1000": 1000, "checkpoint-20000": 20_000},
}


@pytest.mark.parametrize("scheme", PUBLIC)
def test_public_series_are_in_order_of_training(scheme):
    steps = list(PUBLIC[scheme].values())
    assert steps_of_names(list(PUBLIC[scheme]), "models") == steps == sorted(steps)


def test_where_phases_begin_is_reported():
    lines = []
    steps_of_names(list(PUBLIC["Ettin"]), "models", lines.append)
    assert lines == ["models: steps count on from phase to phase; those of ext at 599525, decay at 601525"]


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["chck_1M", "chck_10M", "chck_100M", "main"], "chck_100M and main are not named alike"),
        (["multiberts-seed_0", "multiberts-seed_0-step_20k"], "seed_0 and multiberts-seed_0-step_20k are not named"),
        (["step_100_v2", "step_200_v3"], "step_100_v2 and step_200_v3 differ in more than one number"),
        (["seed_0-step_20k", "seed_1-step_40k"], "seed_0-step_20k and seed_1-step_40k differ in more than one number"),
        (["seed_0-step_20k", "seed_1-step_20k"], "seed_0-step_20k and seed_1-step_20k differ in more than one number"),
        (["seed0-step20", "seed1-step20"], "seed0-step20 and seed1-step20 differ in more than one number"),
        (["a_1-lr_2", "a_2-lr_3"], "a_1-lr_2 and a_2-lr_3 differ in more than one number"),
        (["step100", "checkpoint-200"], "checkpoint-200 and step100 are not named alike"),
        ([OLMO[0], "stage2-ingredient1-step9-tokens1B", "stage2-ingredient2-step9-tokens1B"], "are of two runs of one"),
    ],
)
def test_names_that_leave_the_order_open_are_refused(names, named):
    with pytest.raises(InputError, match=f"^models: [^\n]*{named}[^\n]*give --step-pattern$"):
        steps_of_names(sorted(names), "models")


def test_a_pattern_finds_the_step_with_its_unit():
    pattern = re.compile(r"_(\d+k?)(?:_|$)")
    assert [step_by_pattern(name, pattern, "here") for name in ("a_100_v2", "b_2k_v1")] == [100, 2000]
    assert step_by_pattern("a_b_7", re.compile(r"(a|b)_(?P<step>\d+)"), "here") == 7
    with pytest.raises(InputError, match=r"^here: --step-pattern .* does not find a step in it"):
        step_by_pattern("a_100k5", pattern, "here")
