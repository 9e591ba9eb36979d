"""The whole analysis of a set of runs, as one value that tables, figures and the report are made from."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sas.report.claims import answer_claims
from megatron_sas.report.comparisons import compare_to_controls, runs_of, summarize
from megatron_sas.report.findings import caveats, headline, narrate
from megatron_sas.report.responses import stage_responses, weight_response
from megatron_sas.report.run_onsets import find_onsets, order_of
from megatron_sas.report.trajectories import Run

TITLE = "Syntactic attention over training"


class Analysis:
    """Onsets, comparisons, responses and claims of runs, which are in the order of their conditions.

    `orders` are by condition, without those where no run shows both onsets; `stages` by the name of their figure.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        delta: float,
        replicates: int = 200,
        seed: int = 0,
        notes: Sequence[str] = (),
        title: str | None = None,
    ) -> None:
        """`notes` of reading the runs come first among the caveats. `title` is the report's; None: one for all."""
        self.delta, self.replicates, self.title = delta, replicates, title or TITLE
        self.conditions = summarize(runs)
        self.runs = runs_of(self.conditions)
        self.onsets = find_onsets(self.runs, delta, replicates, seed)
        orders = {condition.label: order_of(condition.runs, self.onsets) for condition in self.conditions}
        self.orders = {label: order for label, order in orders.items() if order is not None}
        self.to_controls = compare_to_controls(self.conditions)
        self.weights, self.control_weights = weight_response(self.conditions)
        stages = stage_responses(self.conditions)
        self.stages = {f"stage_length_{s.weight:g}" if len(stages) > 1 else "stage_length": s for s in stages}
        self.claims = answer_claims(self.conditions, self.onsets, delta)
        self.headline = headline(self.conditions, self.onsets)
        self.findings = narrate(self.conditions, self.onsets, self.to_controls)
        self.notes = [*notes, *caveats(self.conditions)]

    @property
    def with_items(self) -> list[Run]:
        """Runs with an onset interval from resampled items."""
        return [run for run in self.runs if any(onset.items for onset in self.onsets[run.path].values())]
