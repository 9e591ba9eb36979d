"""The registry of terms, and what a run makes of it."""

from __future__ import annotations

import pytest

from megatron_sas.config import Config, load_config
from megatron_sas.objective.terms import TERMS, make_terms, weights
from megatron_sas.optim.schedules import Stages


def configured(tmp_path, **sections) -> Config:
    """A configuration with the given sections of terms."""
    path = tmp_path / "config.yaml"
    lines = ["run: {output_dir: a}", "data: {train: b}", "train: {steps: 9, micro_batch_size: 1}"]
    path.write_text("\n".join([*lines, *(f"{name}: {section}" for name, section in sections.items())]))
    return load_config(path)


@pytest.mark.parametrize("name", TERMS)
def test_a_term_owns_its_name_and_its_section(name):
    term = TERMS[name]
    assert term.name == name
    assert Config.model_fields[name].annotation is term.section_class
    assert term.section_class().schedule == Stages([])


def test_one_term_is_along_syntax():
    assert [name for name, term in TERMS.items() if term.syntactic] == ["sas"]


def test_terms_without_weight_are_not_in_a_run_but_for_those_that_are_always_measured(tmp_path):
    config = configured(tmp_path)
    always = [name for name, term in TERMS.items() if term.in_every_run]
    assert list(config.terms()) == always == ["sas"]
    assert set(config.used()) & set(TERMS) == set(always)


def test_weights_are_those_of_the_schedules(tmp_path):
    terms = configured(tmp_path, sas="{schedule: [{start: 2, end: 4, value: 0.5}]}").terms()
    assert [weights(terms, step)["sas"] for step in (1, 2, 3, 4)] == [0, 0.5, 0.5, 0]


def test_terms_are_made_in_the_order_of_the_registry():
    sections = {name: term.section_class(schedule=0.1) for name, term in reversed(TERMS.items())}
    assert list(make_terms(sections)) == list(TERMS)
