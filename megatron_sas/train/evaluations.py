"""Live evaluations at the steps that the configuration names, and what they are worth a warning of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_sas.evaluation.live import collapsed_attention, evaluation_line
from megatron_sas.launch.watchdog import Watchdog
from megatron_sas.objective.terms import weights
from megatron_sas.train.build import BuiltRun
from megatron_sas.train.collaborator import Collaborator
from megatron_sas.train.journal import Journal
from megatron_sas.train.stop_vote import Stopped, StopVote

COLLAPSE = "attention_collapsed"
"""The event of a warning that a run gives once."""
COSTLY_SHARE = 0.25
"""Evaluations that take more of a run than this are worth a line."""
MEASURED_UPDATES = 10
"""Updates after which it is known well enough how long one takes."""


class Evaluations(Collaborator):
    """Evaluates the model. `owed`: the evaluation of the last step was abandoned, because the run stops."""

    def __init__(
        self, built: BuiltRun, journal: Journal, vote: StopVote, watchdog: Watchdog, before: Callable[[], None]
    ) -> None:
        """`before` is called before an evaluation: it brings records and clock up to date."""
        self.evaluation, self.engine, self.throughput = built.state.evaluation, built.engine, built.throughput
        self.journal, self.vote, self.watchdog, self.before = journal, vote, watchdog, before
        self.terms, self.last_step, self.clock = built.state.terms, built.config.train.steps, built.clock
        self.owed = False
        self._seconds: float | None = None  # of the last evaluation
        self._first: tuple[int, float] | None = None  # step and seconds of training when this start began

    def _due(self, step: int) -> bool:
        return self.evaluation.section.due(step, self.last_step)

    def begin(self, step: int, resumed: bool) -> None:
        """Evaluate the initial model, or the resumed one if it was stopped before its evaluation."""
        self._first = (step, self.throughput.seconds)
        if self._due(step) and not (resumed and self.journal.evaluated(step)):
            self._evaluate(step)

    def after_update(self, step: int) -> None:
        """Evaluate if the configuration names this step."""
        if self._due(step):
            self._evaluate(step)
        if self._first is not None and step - self._first[0] >= MEASURED_UPDATES and self._seconds is not None:
            self._report_cost(step)

    def _evaluate(self, step: int) -> None:
        self.before()
        started = self.clock()
        try:
            with self.throughput.paused(), self.engine.evaluation():
                values = self.evaluation.evaluate(self.engine.bert, self._between_batches)
                values["seconds"] = self.clock() - started
                values["weight_norm"] = self.engine.weight_norm()
        except Stopped:  # the resumed run makes this evaluation
            self.owed = True
            return
        self._seconds = values["seconds"]
        self.journal.record("evaluation", step, values)
        if shown := evaluation_line(values):
            width = len(str(self.last_step))
            self.journal.log(f"step {step:>{width}}/{self.last_step}  evaluation: {shown}  ({values['seconds']:.1f} s)")
        self._warn_of_collapse(step, values)

    def _between_batches(self) -> None:
        self.watchdog.beat("an evaluation")
        self.vote.check()

    def _report_cost(self, step: int) -> None:
        """Once a start, report evaluations that take much of the run. Nothing but this line depends on the clock."""
        self.before()
        first, seconds = self._first
        self._first = None
        number = sum(map(self._due, range(first, self.last_step + 1)))
        evaluating = number * self._seconds
        training = (self.throughput.seconds - seconds) / (step - first) * (self.last_step - first)
        if (share := evaluating / (evaluating + training)) > COSTLY_SHARE:
            self.journal.log(
                f"step {step}: {number} evaluations of {self._seconds:.1f} s will take about {share:.0%} of the run; a "
                "larger evaluation.every makes fewer, smaller evaluation.treebank_sentences, blimp_pairs_per_set or "
                "validation_sequences make each shorter"
            )

    def _warn_of_collapse(self, step: int, values: dict[str, Any]) -> None:
        """Log once in a run, and record, that a regularizer has collapsed attention."""
        active = {name: weight for name, weight in weights(self.terms, step - 1).items() if weight} if step else {}
        attention, records = collapsed_attention(values), self.journal.records
        if records is None or not active or attention is None or records.has_event(COLLAPSE):
            return
        under = ", ".join(f"{name} λ = {weight:g}" for name, weight in active.items())  # of the last update
        entropy, largest = attention["entropy"]["mean"], attention["uniform_entropy"]
        special = attention["to_cls"]["mean"] + attention["to_sep"]["mean"]
        heads = attention["collapsed_heads"]
        self.journal.event(step, event=COLLAPSE, entropy=entropy, to_special=special, heads=heads)
        self.journal.log(
            f"step {step}: warning: attention has collapsed under {under}: its entropy is {entropy:.2f} of at "
            f"most {largest:.2f} nats, and {special:.0%} of it goes to [CLS] and [SEP], so more is suppressed than "
            "syntax; try a smaller λ"
        )
