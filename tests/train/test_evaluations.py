"""When a run evaluates its model, and what it prints of evaluations that take long."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

from megatron_sas.evaluation.live import EvaluationSection
from megatron_sas.run.throughput import Throughput
from megatron_sas.train.evaluations import Evaluations
from megatron_sas.train.journal import Journal


class SlowEvaluation:
    """Takes 20 s by a clock that nothing else moves."""

    section, now = EvaluationSection(every=2), 0.0

    def clock(self):
        return self.now

    def evaluate(self, model, after_batch):
        after_batch()
        self.now += 20.0
        return {}


def test_evaluations_are_made_where_the_configuration_says_however_long_they_take(capsys):
    evaluation, journal, made, beats = SlowEvaluation(), Journal(), [], []
    journal.observers.append(lambda kind, step, values: made.append((kind, step, values["seconds"])))
    built = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(steps=12)),
        state=SimpleNamespace(evaluation=evaluation, terms={}),
        engine=SimpleNamespace(bert=None, evaluation=contextlib.nullcontext, weight_norm=lambda: 1.0),
        throughput=Throughput(clock=evaluation.clock),
        clock=evaluation.clock,
    )
    vote, watchdog = SimpleNamespace(check=lambda: None), SimpleNamespace(beat=beats.append)
    collaborator = Evaluations(built, journal, vote, watchdog, lambda: None)
    collaborator.begin(0, resumed=False)
    for step in range(1, 13):
        collaborator.after_update(step)
    assert made == [("evaluation", step, 20.0) for step in (0, 2, 4, 6, 8, 10, 12)]
    assert beats == ["an evaluation"] * 7
    out = capsys.readouterr().out
    assert out.count("step 10: 7 evaluations of 20.0 s will take about 100% of the run; a larger evaluation.every") == 1
    assert out.count("will take about") == 1
