"""The tasks of GLUE (Wang et al. 2019): what their files look like, and how they are scored.

Scores are those of scikit-learn and SciPy, which the metric script "glue" of the library `evaluate` calls too; that
script is downloaded when it is used, and compute nodes often have no network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_sas.evaluation.base import Metric


@dataclass(frozen=True)
class Task:
    """`text` has one entry (single sentences) or two (pairs); each entry lists the names a column may have, `label`
    likewise. `classes` are the names of the labels 0, 1, …; empty for scores (regression). `positions` are text and
    label columns of a TSV file without header. `folder` and the file names are those of the GLUE download."""

    name: str
    folder: str
    text: tuple[tuple[str, ...], ...]
    label: tuple[str, ...]
    classes: tuple[str, ...]
    metric: str  # the one that stands for the task
    positions: tuple[int, ...] | None = None
    validation: tuple[str, ...] = ("dev.tsv",)
    hub_validation: tuple[str, ...] = ("validation",)

    @property
    def is_regression(self) -> bool:
        """Whether labels are scores."""
        return not self.classes

    def score(self, labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
        """All metrics of the task, `metric` among them; both arrays are (N,) of class numbers, or of scores."""
        return _SCORES[self.name](labels, predictions)


_ENTAILMENT = ("entailment", "not_entailment")
_TWO = (("sentence1",), ("sentence2",))
SCORE_RANGE = (0.0, 5.0)  # of STS-B
GLUE = Metric("", title="GLUE", name="glue", direction=1)
"""The mean over tasks, of final models only: no curve, no key in records."""
NOT_AVERAGED = frozenset({"wnli"})  # tasks that averages over tasks leave out, as most papers do
MISMATCHED = "_mismatched"  # ending of the metrics on MNLI's second validation set

TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", (("sentence",),), ("label",), ("unacceptable", "acceptable"), "matthews_correlation",
             positions=(3, 1)),
        Task("sst2", "SST-2", (("sentence",),), ("label",), ("negative", "positive"), "accuracy"),
        Task("mrpc", "MRPC", (("sentence1", "#1 String"), ("sentence2", "#2 String")), ("label", "Quality"),
             ("not_equivalent", "equivalent"), "combined_score"),
        Task("stsb", "STS-B", _TWO, ("label", "score"), (), "combined_score"),
        Task("qqp", "QQP", (("question1",), ("question2",)), ("label", "is_duplicate"),
             ("not_duplicate", "duplicate"), "combined_score"),
        Task("mnli", "MNLI", (("premise", "sentence1"), ("hypothesis", "sentence2")), ("gold_label", "label"),
             ("entailment", "neutral", "contradiction"), "accuracy",
             validation=("dev_matched.tsv", "dev_mismatched.tsv"),
             hub_validation=("validation_matched", "validation_mismatched")),
        Task("qnli", "QNLI", (("question",), ("sentence",)), ("label",), _ENTAILMENT, "accuracy"),
        Task("rte", "RTE", _TWO, ("label",), _ENTAILMENT, "accuracy"),
        Task("wnli", "WNLI", _TWO, ("label",), ("not_entailment", "entailment"), "accuracy"),
    )
}  # fmt: skip


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    return {"accuracy": float((labels == predictions).mean())}


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_correlation": float(matthews_corrcoef(labels, predictions)), **_accuracy(labels, predictions)}


def _f1_and_accuracy(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import f1_score

    f1 = float(f1_score(labels, predictions, zero_division=0.0))
    accuracy = _accuracy(labels, predictions)["accuracy"]
    return {"f1": f1, "accuracy": accuracy, "combined_score": (f1 + accuracy) / 2}


def _correlations(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """A constant prediction, which has no correlation, counts as 0."""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(predictions) == 0:
        return {"pearson": 0.0, "spearman": 0.0, "combined_score": 0.0}
    pearson = float(pearsonr(labels, predictions).statistic)
    spearman = float(spearmanr(labels, predictions).statistic)
    return {"pearson": pearson, "spearman": spearman, "combined_score": (pearson + spearman) / 2}


_SCORES: dict[str, Callable[[np.ndarray, np.ndarray], dict[str, float]]] = {
    "cola": _matthews,
    "mrpc": _f1_and_accuracy,
    "qqp": _f1_and_accuracy,
    "stsb": _correlations,
    **dict.fromkeys(("sst2", "mnli", "qnli", "rte", "wnli"), _accuracy),
}
