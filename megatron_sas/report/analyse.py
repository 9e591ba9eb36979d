"""The whole analysis of a set of runs, as one value that tables, figures and the report are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sas.report.claims import Claim, answer_claims
from megatron_sas.report.comparisons import Comparison, Condition, compare_to_controls, runs_of, summarize
from megatron_sas.report.findings import Finding, caveats, narrate
from megatron_sas.report.responses import ResponsePoint, StageResponse, stage_responses, weight_response
from megatron_sas.report.run_onsets import Onsets, Order, find_onsets, order_of
from megatron_sas.report.trajectories import Run

TITLE = "Syntactic attention over training"


@dataclass(frozen=True)
class Analysis:
    """Everything that was computed. `runs` are in the order of their conditions.

    `orders` are by condition, without those where no run shows both onsets. `stages` are by the name of their figure.
    """

    runs: list[Run]
    conditions: list[Condition]
    delta: float
    replicates: int
    onsets: Onsets
    orders: dict[str, Order]
    to_controls: list[Comparison]
    weights: list[ResponsePoint]
    control_weights: list[ResponsePoint]
    stages: dict[str, StageResponse]
    claims: list[Claim]
    findings: list[Finding]
    notes: list[str]
    title: str = TITLE

    @property
    def with_items(self) -> list[Run]:
        """Runs with an onset interval from resampled items."""
        return [run for run in self.runs if any(onset.items for onset in self.onsets[run.path].values())]


def analyse(
    runs: Sequence[Run],
    delta: float,
    replicates: int = 200,
    seed: int = 0,
    notes: Sequence[str] = (),
    title: str | None = None,
) -> Analysis:
    """Onsets, comparisons, responses and claims of `runs`; `notes` of reading them come first among the caveats.

    `title` is the report's; None for one that suits all.
    """
    conditions = summarize(runs)
    ordered = runs_of(conditions)
    onsets = find_onsets(ordered, delta, replicates, seed)
    orders = {condition.label: order_of(condition.runs, onsets) for condition in conditions}
    syntax, controls = weight_response(conditions)
    to_controls = compare_to_controls(conditions)
    stages = stage_responses(conditions)
    return Analysis(
        runs=ordered,
        conditions=conditions,
        delta=delta,
        replicates=replicates,
        onsets=onsets,
        orders={label: order for label, order in orders.items() if order is not None},
        to_controls=to_controls,
        weights=syntax,
        control_weights=controls,
        stages={f"stage_length_{s.weight:g}" if len(stages) > 1 else "stage_length": s for s in stages},
        claims=answer_claims(conditions, onsets, delta),
        findings=narrate(conditions, onsets, to_controls),
        notes=[*notes, *caveats(conditions)],
        title=title or TITLE,
    )
